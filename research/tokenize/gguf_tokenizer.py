"""A tokenizer from the metadata of a GGUF file, which llama.cpp wrote."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from research.core.errors import UserError
from research.models.families.config_fields import ConfigFields
from research.tokenize.tokenizer import Tokenizer

# How Llama 3 splits text before byte-pair encoding, from its tokenizer.json.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KEY = "tokenizer.ggml."
ENDS = ("eos", "eot", "eom")  # of a document, a turn, and a message to a tool
CONTROL, USER_DEFINED = 3, 4  # Types of tokens.


def from_gguf_metadata(
    metadata: Mapping[str, Any], where: str = "the GGUF file"
) -> Tokenizer:
    """Builds a byte-level BPE tokenizer from a GGUF file's `tokenizer.*` keys.

    Args:
      metadata: all keys of the file.
      where: the file, for messages.

    Raises:
      UserError: the file's tokenizer is of another kind, or a key is missing or
        malformed.
    """
    fields = ConfigFields(metadata, where)
    kind, cut = fields.get(f"{KEY}model"), fields.get(f"{KEY}pre")
    if kind != "gpt2" or cut not in (*PRE_TOKENIZERS,):
        raise UserError(
            f"{where}: the tokenizer is {kind!r} and splits text as {cut!r}; gpt2 "
            f"(byte-level BPE) that splits as {', '.join(PRE_TOKENIZERS)} can be "
            "built. Use the model's Hugging Face folder instead"
        )
    tokens = fields.texts(f"{KEY}tokens")
    inner = _byte_level_bpe(fields, cut, tokens)

    def named(name: str) -> str | None:
        index = fields.integer(
            f"{KEY}{name}_token_id", -1, low=-1, high=len(tokens) - 1
        )
        return tokens[index] if index >= 0 else None

    marks = {"pad_token": named("padding"), "unk_token": named("unknown")}
    ends = (fields.integer(f"{KEY}{name}_token_id", -1, low=-1) for name in ENDS)
    return Tokenizer(
        inner,
        bos=named("bos"),
        eos=named("eos"),
        # As llama.cpp: the tokenizer of Llama 3 has it without a word in the file.
        add_bos=fields.flag(f"{KEY}add_bos_token", cut == "llama-bpe"),
        chat_template=fields.text("tokenizer.chat_template", ""),
        settings={name: mark for name, mark in marks.items() if mark},
        end_ids=[i for i in ends if i >= 0],
    )


def _byte_level_bpe(
    fields: ConfigFields, cut: str, tokens: list[str]
) -> tokenizers.Tokenizer:
    types = fields.get(f"{KEY}token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise fields.wrong(
            f"{KEY}token_type", types, f"a list of {len(tokens)}, one for each token"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in fields.texts(f"{KEY}merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(
            vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe"
        )
    except Exception as error:  # The library raises nothing more specific.
        raise UserError(
            f"{fields.where}: {KEY}merges do not fit the tokens: {error}"
        ) from error
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = PRE_TOKENIZERS[cut]()
    inner.decoder = decoders.ByteLevel()
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [t for t, k in zip(tokens, types, strict=True) if k == wanted]
        inner.add_tokens(
            [tokenizers.AddedToken(t, special=special, normalized=False) for t in added]
        )
    return inner


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# By the name of llama.cpp.
PRE_TOKENIZERS = {"gpt-2": _gpt2, "smollm": _smollm, "llama-bpe": _llama3}
