"""Text as it comes equals text decoded at once, and holds no stop text."""

import random

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from research.engine.answers.text_stream import Detokenizer, StopTexts
from research.tokenize.tokenizer import Tokenizer
from research.tokenize.tokenizer_training import byte_tokenizer, train_bpe

TEXTS = (
    "Plain words, then more.",
    "  two spaces,\n\ta tab \n",
    "naïve café, Ελληνικά, 你好世界, हिन्दी",
    "family 👩‍👩‍👧‍👦, flag 🇫🇮, skin 👍🏽, \u0301combining",
    "a \ufffd that was meant, \ufffd\ufffd",
    "",
)


def sentence_pieces(decoder):
    """Words begin with ▁, and a character without a piece is its bytes."""
    letters = [chr(i) for i in range(33, 127)]
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "\n", "\t"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *letters]))}
    merges = [("▁", letter) for letter in "amtw"]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    inner.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.Prepend("▁"),
            tokenizers.normalizers.Replace(" ", "▁"),
        ]
    )
    inner.decoder = decoder
    return Tokenizer(inner, bos=None, eos="</s>")


KINDS = {
    "bytes": byte_tokenizer(),
    "bpe": train_bpe(iter([*TEXTS] * 3), 300),
    "llama": sentence_pieces(
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    ),
    "gemma": sentence_pieces(
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    ),
    "metaspace": sentence_pieces(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    ),
}


def pieces_of(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    return [*(stream.push(i) for i in ids), stream.close()]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_equal_the_decoded_ids(kind):
    tokenizer = KINDS[kind]
    for text in [*TEXTS, " ".join(TEXTS)]:
        (ids,) = tokenizer.encode_texts([text])
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        # No piece ends inside a character.
        whole = tokenizer.decode(ids)
        assert sum(piece.count("\ufffd") for piece in pieces) == whole.count("\ufffd")
        with_controls = [j for i in ids for j in (i, tokenizer.eos)]
        assert "".join(pieces_of(tokenizer, with_controls)) == whole


@given(st.lists(st.integers(0, 255), max_size=60))
@settings(deadline=None, max_examples=60)
def test_bytes_that_are_no_text_come_out_as_decoded(ids):
    for kind in ("bytes", "bpe"):
        assert "".join(pieces_of(KINDS[kind], ids)) == KINDS[kind].decode(ids)


def test_a_character_comes_with_its_last_token():
    (ids,) = KINDS["bytes"].encode_texts(["a👍b"])
    assert pieces_of(KINDS["bytes"], ids) == ["a", "", "", "", "👍", "b", ""]


class Counting:
    """Counts the ids that are decoded."""

    def __init__(self, inner):
        self.inner, self.control_ids, self.decoded = inner, inner.control_ids, 0

    def decode(self, ids):
        self.decoded += len(ids)
        return self.inner.decode(ids)


@pytest.mark.parametrize("token", [ord("a"), 0xFF, "end"])
def test_the_cost_of_an_answer_is_linear(token):
    """Also of one that ignores its end, and of bytes that never become a text."""
    plain = KINDS["bytes"]
    byte = {chr(i): plain.encode_texts([chr(i)])[0][0] for i in range(128)}
    ids = {"end": plain.eos, 0xFF: 255}.get(token, byte["a"])
    counts = []
    for length in (200, 400):
        tokenizer = Counting(plain)
        pieces_of(tokenizer, [ids] * length)
        counts.append(tokenizer.decoded)
    assert counts[1] < 2.5 * counts[0]


# -- stop texts ------------------------------------------------------------------------


def stopped(stops, pieces):
    stop, shown = StopTexts(stops), ""
    for piece in pieces:
        text, ended = stop.push(piece)
        shown += text
        if ended:
            return shown, True
    return shown + stop.close(), False


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["abc", "b"], "xabc", "xa"),  # "b" is complete first.
        (["bc", "abc"], "xabc", "x"),
        (["aab"], "aaab", "a"),
        (["👍🏽"], "a👍b👍🏽c", "a👍b"),
        (["END"], "EN", "EN"),
        ([], "all", "all"),
    ],
)
def test_an_answer_ends_before_its_stop_text(stops, text, shown):
    ended = shown != text
    assert stopped(stops, [text]) == (shown, ended)
    assert stopped(stops, text) == (shown, ended)


@given(
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.text("ab\n", max_size=30),
    st.integers(),
)
@settings(deadline=None, max_examples=60)
def test_it_ends_at_the_same_place_however_the_pieces_are_cut(stops, text, seed):
    rng, pieces, rest = random.Random(seed), [], text
    while rest:
        cut = rng.randint(1, 5)
        pieces.append(rest[:cut])
        rest = rest[cut:]
    shown, ended = stopped(stops, pieces)
    assert (shown, ended) == stopped(stops, text)
    assert not any(stop in shown for stop in stops)
    assert ended == any(stop in text for stop in stops)


def test_only_the_possible_start_of_a_stop_text_is_held_back():
    stop = StopTexts(["###", "##\n"])
    assert stop.push("a#") == ("a", False)
    assert stop.push("b") == ("#b", False)
    assert stop.push("##") == ("", False)
    assert stop.push("x") == ("##x", False)
