"""The ways in which llama.cpp cuts text before byte-pair encoding, by its names.

A GGUF file holds the name alone, and llama.cpp refuses a file with a name that it does
not know. A file is read by the name; for writing, the name is found by what a tokenizer
does to a text.
"""

import dataclasses
import json
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

PreTokenizer = pre_tokenizers.PreTokenizer

_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r" ?[^\s\p{L}\p{N}]", r" ?[^\s\p{L}\p{M}\p{N}]"
)
# A word ends where small letters are followed by a capital one.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD, _SLASHES = r"[^\r\n\p{L}\p{N}]?", _REST.replace(r"[\r\n]*", r"[\r\n/]*")
_GPT4O = (
    rf"{_LEAD}{_UPPER}*{_LOWER}+{_ENDINGS}?|{_LEAD}{_UPPER}+{_LOWER}*{_ENDINGS}?|"
    rf"\p{{N}}{{1,3}}|{_SLASHES}"
)
_TEKKEN = rf"{_LEAD}{_UPPER}*{_LOWER}+|{_LEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHES}"


def _byte_level(*before: PreTokenizer) -> PreTokenizer:
    """`before`, and then bytes as characters; GPT-2's own cut if `before` is empty."""
    expression = not before or isinstance(before[0], pre_tokenizers.Digits)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def _split(expression: str) -> PreTokenizer:
    return _byte_level(pre_tokenizers.Split(tokenizers.Regex(expression), "isolated"))


@dataclasses.dataclass(frozen=True)
class NamedCut:
    """One way to cut text.

    Attributes:
      cuts: the pre-tokenizer; its pieces are bytes as characters.
      whole_words: a piece that is a token becomes it, whatever the merges say.
      adds_bos: a file that does not say otherwise has its texts begin with a token.
      aliases: further names of llama.cpp for the same.
    """

    cuts: PreTokenizer
    whole_words: bool = False
    adds_bos: bool = False
    aliases: tuple[str, ...] = ()


CUTS = {
    "gpt-2": NamedCut(_byte_level(), aliases=("olmo", "mpt", "phi-2", "mellum")),
    "smollm": NamedCut(
        _byte_level(pre_tokenizers.Digits(individual_digits=True)),
        aliases=("refact", "starcoder", "codeshell", "command-r"),
    ),
    "llama-bpe": NamedCut(
        _split(LLAMA3_SPLIT),
        whole_words=True,
        adds_bos=True,
        aliases=("llama3", "llama-v3", "falcon3"),
    ),
    "dbrx": NamedCut(_split(LLAMA3_SPLIT), aliases=("smaug-bpe",)),
    "qwen2": NamedCut(
        _split(_QWEN2), aliases=("stablelm2", "deepseek-r1-qwen", "megrez")
    ),
    "qwen35": NamedCut(_split(_QWEN35)),
    "gpt-4o": NamedCut(_split(_GPT4O), aliases=("llama4",)),
    "tekken": NamedCut(_split(_TEKKEN), whole_words=True, adds_bos=True),
}
# These compose accents with their letters first (NFC); llama.cpp itself does not.
COMPOSED = {"olmo", "mpt", "qwen2", "deepseek-r1-qwen"}
BY_NAME = {name: cut for own, cut in CUTS.items() for name in (own, *cut.aliases)}

# llama.cpp wants a list of merges, and a list cannot be empty. This one never applies:
# bytes as characters do not contain it.
NO_MERGES = "\u2581 \u2581"
# Cut in another place by each way of CUTS: contractions, digits, marks, white space.
PROBE = (
    "Hello, it's 1 12 123 1234 12345 DON'T We'Ll camelCase HTTPServer étéÉTÉ e\u0301a "
    "naïve/\n//path/\n\n x  y   z\t\tq \r\n\r\n  end.\n\n\n   ...!!!\n ¿Qué? 中文字符 "
    "русский ١٢٣٤ ½² 🙂👍🏽 a_b-c'd \"quoted\" 'tis I'm\u00a0here\u3000x ﬁ हिन्दी ก็ "
    "x=1;y+=2 $99.50 (a)[b]{c} end  "
)


def name_of_cut(rules: dict[str, Any]) -> str | None:
    """llama.cpp's name for what a byte-level BPE does to text; None if it has none.

    Args:
      rules: the content of a `tokenizer.json`.
    """
    name = _own_name(rules)
    if name is None:
        return None
    composed = rules["normalizer"] is not None
    names = (name, *CUTS[name].aliases)
    return next((n for n in names if (n in COMPOSED) == composed), name)


def _own_name(rules: dict[str, Any]) -> str | None:
    model = rules["model"]
    whole = bool(model.get("ignore_merges"))
    if not model["merges"] and not whole:
        return "gpt-2"  # Every byte is a token, wherever the text is cut.
    if rules["pre_tokenizer"] is None:
        return None
    own = pieces(_pre_tokenizer(rules["pre_tokenizer"]))
    alike = [name for name, cut in CUTS.items() if pieces(cut.cuts) == own]
    for name in alike:
        if CUTS[name].whole_words == whole:
            return name
    return alike[0] if alike and _merges_make_all(rules) else None


def pieces(cuts: PreTokenizer) -> list[str]:
    """The pieces that PROBE is cut into."""
    return [piece for piece, _ in cuts.pre_tokenize_str(PROBE)]


def _pre_tokenizer(description: dict[str, Any]) -> PreTokenizer:
    empty = tokenizers.Tokenizer(models.BPE())
    rules = json.loads(empty.to_str()) | {"pre_tokenizer": description}
    read = tokenizers.Tokenizer.from_str(json.dumps(rules)).pre_tokenizer
    assert read is not None
    return read


def _merges_make_all(rules: dict[str, Any]) -> bool:
    """Whether each token follows from the merges, so that whole words need no rule."""
    model = rules["model"]
    merges = [
        tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]
    ]
    merging = models.BPE(vocab=model["vocab"], merges=merges)
    added = {token["content"] for token in rules["added_tokens"]}
    return all(
        [found.id for found in merging.tokenize(token)] == [i]
        for token, i in model["vocab"].items()
        if token not in added
    )
