"""The share of a text that its ids do not give back is found, whatever loses it."""

import pytest
import tokenizers
from chat_families import FAMILIES
from text_helpers import make_texts, text_config, write_texts
from tokenizers import decoders, models, normalizers, pre_tokenizers

from research.data.text.choose_tokenizer import open_tokenizer
from research.tasks.findings import examine_lost_text
from research.tasks.pretraining import TextTask
from research.tokenize.lost_text import count_lost
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.tokenizer_training import byte_tokenizer, save_tokenizer

TEXT = "Ärger, Ärger: 'Über' 3 Füße?\n\tx  y\n"
LETTERS = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz \n\t0123456789.,:?'")}


def finished(inner):
    inner.add_special_tokens(["</s>"])
    return Tokenizer(inner, bos=None, eos="</s>")


def lower():
    inner = tokenizers.Tokenizer.from_str(byte_tokenizer().to_json())
    inner.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    return finished(inner)


def letters(unknown):
    """Knows small letters. It drops all others, or writes one id for them."""
    vocabulary = LETTERS | ({"<unk>": len(LETTERS)} if unknown else {})
    model = models.BPE(vocabulary, [], unk_token="<unk>" if unknown else None)
    inner = tokenizers.Tokenizer(model)
    inner.add_special_tokens(["<unk>"] * unknown)
    inner.decoder = decoders.Fuse()
    return finished(inner)


def without_bytes():
    """Byte-level, and some bytes are missing."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(alphabet) if c not in "Ãļ"}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return finished(inner)


@pytest.mark.parametrize(
    "make, lost",
    [
        (lower, "ÄÄÜFü"),
        (lambda: letters(True), "ÄÄÜFüß"),
        (lambda: letters(False), "ÄÄÜFüß"),
    ],
    ids=["lower", "unknown", "dropped"],
)
def test_each_lost_letter_is_counted(make, lost):
    found = count_lost(make(), [TEXT, "all of it. "])
    assert found.total == len((TEXT + "all of it. ").encode())
    assert found.lost == len(lost.encode())
    assert found.letters[0] == "Ä"


def test_missing_bytes_are_lost_text():
    assert count_lost(without_bytes(), [TEXT]).share > 0.2
    assert count_lost(without_bytes(), ["plain"]).lost == 0


@pytest.mark.parametrize(
    "name", ["chatml", "llama3.1", "llama2", "mistral v1", "gemma 2"]
)
def test_nothing_is_lost_by_the_kinds_that_keep_all(name):
    facts = FAMILIES[name]
    tokenizer = Tokenizer(facts.tokenizer(), bos=facts.bos, eos=facts.control[-1])
    texts = [*make_texts(20), TEXT, "  two spaces", "\n\n", "</s><|im_end|>"]
    assert count_lost(tokenizer, texts).lost == 0


def task_of(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path / "tok")
    write_texts(tmp_path / "loud", [f"{i} HELLO, 'Ä' AND 'Ö' {i}" for i in range(80)])
    write_texts(tmp_path / "quiet", [f"{i} hello and no more {i}" for i in range(80)])
    where = [f"{name}={tmp_path / name}" for name in ("loud", "quiet")]
    config = text_config(tmp_path, *where, tokenizer=str(tmp_path / "tok"))
    opened = open_tokenizer(config.text, config.data)
    return TextTask(config, opened, 2048, (0, 1))


def test_no_bits_per_byte_are_given_of_a_text_that_is_lost(tmp_path):
    task = task_of(tmp_path, lower())
    assert task.held_out_bytes.keys() == {"quiet"}
    (finding,) = [f for f in task.examine() if f.name == "tokenizer round trip"]
    assert finding.ok and 0.3 < finding.numbers["lost loud"] < 0.5
    assert finding.numbers["lost quiet"] == 0
    assert "of loud is lost, most often" in finding.text
    assert "no bits per byte are given for loud" in finding.text


def test_a_text_that_is_mostly_unknown_stops_the_run():
    lost = {"s": count_lost(letters(False), ["日本語" * 9])}
    finding = examine_lost_text(lost, bits_per_byte=True)
    assert not finding.ok and "100.00% of s is lost" in finding.text
