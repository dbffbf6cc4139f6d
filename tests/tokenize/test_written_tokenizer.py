"""A tokenizer that is written for llama.cpp is read back as it was."""

import json

import pytest
import tokenizers
from exported_models import TALE, sentence_pieces
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from research.core.errors import UserError
from research.tokenize.gguf.gguf_tokenizer import (
    CONTROL,
    USER_DEFINED,
    from_gguf_metadata,
)
from research.tokenize.gguf.pre_tokenizers import (
    COMPOSED,
    CUTS,
    PROBE,
    name_of_cut,
    pieces,
)
from research.tokenize.gguf.written_tokenizer import UNUSED, tokenizer_metadata
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.tokenizer_training import byte_tokenizer, train_bpe

KEY = "tokenizer.ggml."
TEXTS = [PROBE, "", "plain words", "x<|end|>y <think> 12345\n\n\tz é 日本"]


def make_bpe(cut, size=320, texts=(PROBE,) * 3, **rules):
    """A byte-level BPE that cuts text by `cut`, trained on `texts`."""
    inner = tokenizers.Tokenizer(models.BPE(**rules))
    inner.pre_tokenizer = cut
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "<|end|>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    inner.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return inner


def make_tokenizer(inner, **marks):
    marks = {"bos": "<s>", "eos": "<|end|>", "settings": {"pad_token": "<pad>"}} | marks
    return Tokenizer(inner, chat_template="{{ messages }}", **marks)


@pytest.mark.parametrize("name", CUTS)
def test_each_cut_of_llama_cpp_is_found_and_read_back(name):
    cut = CUTS[name]
    inner = make_bpe(cut.cuts, ignore_merges=cut.whole_words)
    if name in COMPOSED:
        inner.normalizer = normalizers.NFC()
    ours = make_tokenizer(inner, add_bos=True, end_ids=[2])
    metadata = tokenizer_metadata(ours, rows=ours.vocab_size)
    assert metadata[f"{KEY}pre"] == name
    theirs = from_gguf_metadata(metadata)
    assert theirs.encode_texts(TEXTS) == ours.encode_texts(TEXTS)
    for field in ("bos", "eos", "pad", "add_bos", "chat_template", "control_ids"):
        assert getattr(theirs, field) == getattr(ours, field), field
    assert sorted(theirs.end_ids) == sorted(ours.end_ids)


def test_no_two_cuts_are_alike():
    """Or else the probe could not tell which one a tokenizer has."""
    alike = {}
    for name, cut in CUTS.items():
        alike.setdefault((tuple(pieces(cut.cuts)), cut.whole_words), []).append(name)
    assert all(len(names) == 1 for names in alike.values()), alike


def test_our_own_tokenizers_have_names():
    """Bytes are cut in no way at all: without merges it changes nothing."""
    bpe = train_bpe(iter([PROBE] * 3), 300)
    for ours, name in ((byte_tokenizer(), "gpt-2"), (bpe, "smollm")):
        metadata = tokenizer_metadata(ours, ours.vocab_size)
        assert metadata[f"{KEY}pre"] == name
        assert metadata[f"{KEY}merges"]  # llama.cpp demands some.
        theirs = from_gguf_metadata(metadata)
        assert theirs.encode_texts(TEXTS) == ours.encode_texts(TEXTS)


def test_types_and_fillers_of_tokens():
    inner = make_bpe(CUTS["gpt-2"].cuts)
    ours = make_tokenizer(inner)
    count = ours.vocab_size
    metadata = tokenizer_metadata(ours, count + 3)
    names, types = metadata[f"{KEY}tokens"], metadata[f"{KEY}token_type"]
    assert names[count:] == [f"[PAD{i}]" for i in range(count, count + 3)]
    assert types[count:] == [UNUSED] * 3
    assert types[names.index("<|end|>")] == CONTROL
    assert types[names.index("<think>")] == USER_DEFINED
    # A model may have fewer embeddings than there are added tokens.
    fewer = tokenizer_metadata(ours.within(count - 1), count - 1)
    assert len(fewer[f"{KEY}tokens"]) == count - 1


def test_a_merge_rule_for_whole_words_may_be_missing_where_merges_make_them():
    """`ignore_merges` changes nothing in a vocabulary that was trained as BPE."""
    trained = json.loads(make_bpe(CUTS["qwen2"].cuts, ignore_merges=True).to_str())
    # The cut of qwen2 without composed accents.
    assert name_of_cut(trained) == "stablelm2"
    added = max(trained["model"]["vocab"].values()) + 1
    trained["model"]["vocab"]["zqzq"] = added
    assert name_of_cut(trained) is None


DIGITS = pre_tokenizers.Digits(individual_digits=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@pytest.mark.parametrize(
    "cut, normalizer, said",
    [
        (pre_tokenizers.Sequence([DIGITS, BYTES]), None, "cuts text in a way"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None, "cuts text in a way"),
        (BYTES, normalizers.Lowercase(), "changes text beforehand"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(cut, normalizer, said):
    inner = make_bpe(cut)
    if normalizer:
        inner.normalizer = normalizer
    with pytest.raises(UserError, match=said):
        tokenizer_metadata(make_tokenizer(inner), 400)


def test_composed_accents_are_a_warning(caplog):
    inner = make_bpe(BYTES)
    inner.normalizer = normalizers.NFC()
    metadata = tokenizer_metadata(make_tokenizer(inner), 400)
    assert "composes accents" in caplog.text
    assert metadata[f"{KEY}pre"] == "olmo"
    theirs = from_gguf_metadata(metadata)
    assert theirs.encode_texts(["e\u0301"]) == theirs.encode_texts(["\u00e9"])


def test_sentence_pieces_are_read_back():
    """Their scores follow from the merges: the same pieces win."""
    ours = sentence_pieces()
    rows = ours.largest_id + 3
    metadata = tokenizer_metadata(ours, rows)
    assert metadata[f"{KEY}model"] == "llama" and metadata[f"{KEY}add_space_prefix"]
    assert len(metadata[f"{KEY}scores"]) == len(metadata[f"{KEY}tokens"]) == rows
    theirs = from_gguf_metadata(metadata)
    texts = [*TEXTS, TALE, "hello tin cat, the  hat", "<|im_end|>the"]
    assert theirs.encode_texts(texts) == ours.encode_texts(texts)
    assert (theirs.bos, theirs.eos, theirs.add_bos) == (ours.bos, ours.eos, True)
    assert {*theirs.end_ids} == {*ours.end_ids}


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda merges: merges[1:], "no merge makes"),
        (lambda merges: [merges[-1], *merges[:-1]], "stand in several places"),
    ],
)
def test_merges_that_no_scores_can_say_are_refused(change, said):
    ours = sentence_pieces()
    rules = json.loads(ours.to_json())
    rules["model"]["merges"] = change(rules["model"]["merges"])
    inner = tokenizers.Tokenizer.from_str(json.dumps(rules))
    with pytest.raises(UserError, match=said):
        tokenizer_metadata(Tokenizer(inner, bos="<s>", eos="</s>"), 300)


def test_two_tokens_of_one_name_are_refused():
    """llama.cpp stops at them. A filler may have the name of a real token."""
    inner = make_bpe(BYTES)
    inner.add_tokens(["[PAD399]"])
    with pytest.raises(UserError, match=r"two of its tokens are written '\[PAD399\]'"):
        tokenizer_metadata(make_tokenizer(inner), 400)


def test_a_tokenizer_of_another_kind_is_refused():
    inner = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("</s>", 0.0)], 0))
    with pytest.raises(UserError, match="it is a Unigram model"):
        tokenizer_metadata(Tokenizer(inner, bos=None, eos="</s>"), 2)
