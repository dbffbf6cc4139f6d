"""Words of any script, and the form in which short answers are compared."""

import functools
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import regex

# Scripts without spaces between words: each character counts as one word.
_UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
)
_UNSPACED_CHARACTER = rf"[{_UNSPACED}]\p{{M}}*"
_WORD = regex.compile(
    rf"{_UNSPACED_CHARACTER}|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+", regex.V1
)
# A sign is visible: no control or format character, and no half of a pair.
_WORD_OR_SIGN = regex.compile(
    rf"{_WORD.pattern}|[^\s\p{{Cc}}\p{{Cf}}\p{{Cs}}]", regex.V1
)
_SPLIT = regex.compile(
    rf"{_UNSPACED_CHARACTER}|[^\s{_UNSPACED}]+", regex.V1
)  # fmt: skip
# Longer ones are no words but a character that repeats, or a script without spaces.
LONGEST_WORD = 40
_ARTICLES = regex.compile(r"\b(?:a|an|the)\b")
_INSIDE_NUMBERS = regex.compile(r"(?<=\d),(?=\d)")
# Punctuation and the signs of ASCII, without those that make another answer: the point
# and the minus of a number, and what follows a letter in C++, C# and A+.
_PUNCTUATION = regex.compile(
    r"\.(?!\d)|(?<=\p{L})\.|-(?!\.?\d)|(?<=\S)-|(?<![\p{L}+])\+|(?<!\p{L})\#"
    r"|[[\p{P}$<=>^`|~]--[.\-\#]]",
    regex.V1,
)
_MINUS = str.maketrans({"\N{MINUS SIGN}": "-"})


def plain(text: str) -> str:
    """Compatible characters unified (NFKC), without case."""
    return unicodedata.normalize("NFKC", text).casefold()


def words_of(text: str) -> list[str]:
    """Letters and digits of any script, without case; the rest separates words.

    For ASCII these are the words of the package `rouge-score` without stemming.
    Chinese, Japanese, Thai and others without spaces give one word a character.
    """
    return _WORD.findall(plain(text))


def words_and_signs_of(text: str) -> list[str]:
    """As `words_of`, with every other sign as a word, and very long words cut up."""
    found = []
    for word in _WORD_OR_SIGN.findall(plain(text)):
        found += word if len(word) > LONGEST_WORD else [word]
    return found


def letters_of(text: str) -> set[str]:
    """The words of one letter, with their case."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text))
    return {word for word in words if len(word) == 1}


def grams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """All runs of `size` words."""
    return zip(*(words[start:] for start in range(size)), strict=False)


def comparable(text: str, like: str, between: str = "") -> tuple[str, ...]:
    """The words of `text` in the form in which they are compared to those of `like`.

    That of SQuAD (Rajpurkar et al. 2016, `evaluate-v1.1.py`): lower case, without
    punctuation, the articles a, an, the, and surplus space. It departs from SQuAD in
    four places: any script's case and punctuation count; characters of scripts without
    spaces are words; 1.5, -5, C++ and C# keep their signs; and where nothing of `like`
    would stay (the label A, the sign +), its article or its signs stay.

    Args:
      between: stands in the place of punctuation; SQuAD has nothing there.
    """
    for form in (_without_articles, _without_punctuation, _plain):
        if _words_in(like, form, between):
            return _words_in(text, form, between)
    return ()


def _plain(text: str, _: str) -> str:
    return plain(text)


def _without_punctuation(text: str, between: str) -> str:
    whole_numbers = _INSIDE_NUMBERS.sub("", plain(text).translate(_MINUS))
    return _PUNCTUATION.sub(between, whole_numbers)


def _without_articles(text: str, between: str) -> str:
    return _ARTICLES.sub(" ", _without_punctuation(text, between))


@functools.lru_cache(maxsize=4096)
def _words_in(
    text: str, form: Callable[[str, str], str], between: str
) -> tuple[str, ...]:
    return tuple(_SPLIT.findall(form(text, between)))
