"""Tokenizers of llama.cpp's files: SentencePiece's BPE, and ways to split text."""

import itertools
import random

import pytest
from tokenizers import pre_tokenizers

from research.core.errors import UserError
from research.tokenize.gguf.gguf_tokenizer import SPACE, from_gguf_metadata

BYTES = [f"<0x{n:02X}>" for n in range(256)]
PIECES = [
    SPACE, *"abcde\n", "ab", "bc", "abc", SPACE + "a", SPACE + "ab", "de", "cd", "bcd",
    "\n\n", "aa", "é", "日",
]  # fmt: skip
SPACES, WORD, TURN = "  ", "<think>", "<end_of_turn>"
TOKENS = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, SPACES, "   ", WORD, TURN, "<pad>"]
TYPES = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4, 4, 4, 3, 5]


def sentencepiece(seed=0, **changes):
    """A file's metadata; scores put the pieces in an order drawn from `seed`."""
    order = random.Random(seed)
    ranks = order.sample(range(len(TOKENS)), len(TOKENS))
    metadata = {
        "model": "llama", "pre": "default", "tokens": TOKENS, "token_type": TYPES,
        "scores": [-float(rank) for rank in ranks],
    }  # fmt: skip
    return {f"tokenizer.ggml.{k}": v for k, v in (metadata | changes).items()}


def merged(text, metadata):
    """SentencePiece's algorithm in the plainest words: join the best neighbours."""
    pieces = dict(zip(TOKENS, metadata["tokenizer.ggml.scores"], strict=True))
    parts = list(text.replace(" ", SPACE))
    while True:
        joins = [
            (pieces[a + b], -n)
            for n, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in PIECES
        ]
        if not joins:
            break
        n = -max(joins)[1]
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    ids = []
    for part in parts:
        known = [TOKENS.index(part)] if part in PIECES else None
        ids += known or [TOKENS.index(f"<0x{b:02X}>") for b in part.encode()]
    return ids


@pytest.mark.parametrize("seed", range(5))
def test_the_best_scored_neighbours_are_merged_first(seed):
    metadata = sentencepiece(seed, add_space_prefix=False)
    tokenizer = from_gguf_metadata(metadata)
    draw = random.Random(seed)
    for _ in range(100):
        text = "".join(draw.choices("abcde é日\n🙂", k=draw.randint(1, 12)))
        while "  " in text:  # A token of its own; see below.
            text = text.replace("  ", " ")
        (ids,) = tokenizer.encode_texts([text])
        assert ids == merged(text, metadata), text
        assert tokenizer.decode(ids) == text


def test_tokens_of_users_are_found_before_pieces_are_merged():
    """llama.cpp stores runs of spaces as such, and looks for the longest first."""
    tokenizer = from_gguf_metadata(sentencepiece(add_space_prefix=False))
    three, two = TOKENS.index("   "), TOKENS.index("  ")
    assert tokenizer.encode_texts(["     a"])[0][:2] == [three, two]
    assert tokenizer.encode_texts([f"a{WORD}"])[0][-1] == TOKENS.index(WORD)
    assert tokenizer.decode([three, two]) == "     "


def test_control_tokens_in_a_text_are_letters():
    tokenizer = from_gguf_metadata(sentencepiece())
    (ids,) = tokenizer.encode_texts(["<s></s><end_of_turn>"])
    assert not set(ids) & {1, 2, TOKENS.index(TURN)}
    assert tokenizer.decode(ids) == "<s></s><end_of_turn>"


def test_a_word_begins_with_a_space_that_is_not_shown():
    tokenizer = from_gguf_metadata(sentencepiece())
    view = tokenizer._template_view
    ids = view.encode("ab", add_special_tokens=False).ids
    assert ids[0] in (
        TOKENS.index(SPACE),
        TOKENS.index(SPACE + "a"),
        TOKENS.index(SPACE + "ab"),
    )
    assert tokenizer.decode(ids) == "ab"
    # As llama.cpp: again behind a control token.
    again = view.encode("ab</s>ab", add_special_tokens=False).ids
    assert again == [*ids, 2, *ids]


def test_marks_that_the_file_leaves_unsaid_are_those_of_sentencepiece():
    tokenizer = from_gguf_metadata(sentencepiece())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.add_bos) == (1, 2, True)
    assert tokenizer.end_ids == (2, TOKENS.index(TURN))
    said = from_gguf_metadata(
        sentencepiece(eos_token_id=1, bos_token_id=2, eot_token_id=2)
    )
    assert (said.bos, said.eos, said.end_ids) == (2, 1, (1, 2))
    assert not from_gguf_metadata(sentencepiece(add_bos_token=False)).add_bos


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"scores": None}, "ggml.scores is None; it must be"),
        ({"scores": [0.0]}, r"ggml.scores is \[0.0\]; it must be"),
        ({"scores": [float("nan")] * len(TOKENS)}, r"ggml.scores is \[nan, nan"),
        ({"unknown_token_id": 10**6}, "unknown_token_id is 1000000"),
        ({"add_space_prefix": 1}, "add_space_prefix is 1; it must be true or false"),
    ],
)
def test_a_malformed_sentencepiece_is_named(changes, said):
    with pytest.raises(UserError, match=rf"here\.gguf.*{said}"):
        from_gguf_metadata(sentencepiece(**changes), "here.gguf")


TEXT = "Don't we'LL pay 12345½ €\n\n  for x+=1;\tI\u0301 日本 ÀBCdef/\r\n  "
# By hand, from the regular expressions of llama.cpp.
CUTS = {
    "gpt-2": ["Don", "'t", " we", "'", "LL", " pay", " 12345½", " €", "\n\n ", " for"],
    "smollm": ["Don", "'t", " we", "'", "LL", " pay", " ", *"12345½", " €", "\n\n "],
    "qwen2": ["Don", "'t", " we", "'LL", " pay", " ", *"12345½", " €\n\n", " ", " for"],
    "llama-bpe": ["Don", "'t", " we", "'LL", " pay", " ", "123", "45½", " €\n\n", " "],
    "gpt-4o": ["Don't", " we'LL", " pay", " ", "123", "45½", " €\n\n", " ", " for"],
    "tekken": ["Don", "'t", " we", "'LL", " pay", " ", *"12345½", " €\n\n", " "],
}  # fmt: skip


@pytest.mark.parametrize("name, cut", CUTS.items())
def test_text_is_split_as_llama_cpp_splits_it(name, cut):
    tokens = [*pre_tokenizers.ByteLevel.alphabet()]
    metadata = {
        "model": "gpt2", "pre": name, "tokens": tokens, "merges": [],
        "token_type": [1] * len(tokens),
    }  # fmt: skip
    tokenizer = from_gguf_metadata(
        {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}
    )
    inner = tokenizer._template_view
    found = inner.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[slice(*span)] for _, span in found][: len(cut)] == cut
    assert "".join(TEXT[slice(*span)] for _, span in found) == TEXT


@pytest.mark.parametrize("name", ["qwen2", "olmo"])
def test_accents_are_composed_where_the_family_composes_them(name):
    tokens = [*pre_tokenizers.ByteLevel.alphabet()]
    metadata = {
        "model": "gpt2", "pre": name, "tokens": tokens, "merges": [],
        "token_type": [1] * len(tokens),
    }  # fmt: skip
    tokenizer = from_gguf_metadata(
        {f"tokenizer.ggml.{k}": v for k, v in metadata.items()}
    )
    apart, composed = tokenizer.encode_texts(["e\u0301", "\u00e9"])
    assert apart == composed
