"""A tokenizer from the metadata of a GGUF file, which llama.cpp wrote."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from research.core.errors import UserError
from research.models.families.config_fields import ConfigFields
from research.tokenize.gguf.pre_tokenizers import BY_NAME, COMPOSED, NO_MERGES
from research.tokenize.tokenizer import Tokenizer

KEY = "tokenizer.ggml."
ENDS = ("eos", "eot", "eom")  # of a document, a turn, and a message to a tool
# Types of tokens.
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
SPACE = "\u2581"  # SentencePiece's sign for a space
# llama.cpp ends a turn at these, where a file names no token for it.
TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
DEFAULT_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # of SentencePiece


def from_gguf_metadata(
    metadata: Mapping[str, Any], where: str = "the GGUF file"
) -> Tokenizer:
    """Builds the tokenizer of a GGUF file's `tokenizer.*` keys.

    Byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).

    Args:
      metadata: all keys of the file.
      where: the file, for messages.

    Raises:
      UserError: the file's tokenizer is of another kind, or a key is missing or
        malformed.
    """
    fields = ConfigFields(metadata, where)
    kind, cut = fields.get(f"{KEY}model"), fields.get(f"{KEY}pre", "")
    if kind != "llama" and (kind != "gpt2" or cut not in (*BY_NAME,)):
        raise UserError(
            f"{where}: the tokenizer is {kind!r} and splits text as {cut!r}. llama "
            f"(SentencePiece) and gpt2 (byte-level BPE) that splits as "
            f"{', '.join(BY_NAME)} can be built. Use the model's Hugging Face "
            "folder instead"
        )
    tokens, types = fields.texts(f"{KEY}tokens"), fields.get(f"{KEY}token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise fields.wrong(
            f"{KEY}token_type", types, f"a list of {len(tokens)}, one for each token"
        )
    build = _byte_level_bpe if kind == "gpt2" else _sentencepiece
    inner = build(fields, tokens, types)
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [t for t, k in zip(tokens, types, strict=True) if k == wanted and t]
        inner.add_tokens(
            [tokenizers.AddedToken(t, special=special, normalized=False) for t in added]
        )
    ids = _numbered(fields, DEFAULT_IDS if kind == "llama" else {}, len(tokens))
    names = {name: tokens[i] for name, i in ids.items()}
    ends = [ids[name] for name in ENDS if name in ids]
    if "eot" not in ids:
        ends += [
            i for i, t in enumerate(tokens) if t in TURN_ENDS and types[i] != NORMAL
        ]
    marks = {"pad_token": "padding", "unk_token": "unknown"}
    # As llama.cpp: some tokenizers begin a text without a word in the file.
    begins = kind == "llama" or BY_NAME[cut].adds_bos
    return Tokenizer(
        inner,
        bos=names.get("bos"),
        eos=names.get("eos"),
        add_bos=fields.flag(f"{KEY}add_bos_token", begins),
        chat_template=fields.text("tokenizer.chat_template", ""),
        settings={ours: names[name] for ours, name in marks.items() if name in names},
        end_ids=ends,
    )


def _numbered(
    fields: ConfigFields, defaults: Mapping[str, int], count: int
) -> dict[str, int]:
    """The ids of tokens that the file names for a purpose."""
    found = {
        name: fields.integer(
            f"{KEY}{name}_token_id", defaults.get(name, -1), low=-1, high=count - 1
        )
        for name in ("bos", *ENDS, "padding", "unknown")
    }
    return {name: i for name, i in found.items() if i >= 0}


def _byte_level_bpe(
    fields: ConfigFields, tokens: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    cut = fields.text(f"{KEY}pre")
    written = fields.texts(f"{KEY}merges")
    merges = [tuple(x.split(" ", 1)) for x in written if x != NO_MERGES]
    inner = _bpe(fields, tokens, merges, ignore_merges=BY_NAME[cut].whole_words)
    inner.normalizer = normalizers.NFC() if cut in COMPOSED else None
    inner.pre_tokenizer = BY_NAME[cut].cuts
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(
    fields: ConfigFields, tokens: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    """BPE that merges, of all neighbours whose union is a token, the best scored."""
    scores = fields.get(f"{KEY}scores")
    known = isinstance(scores, list) and all(
        isinstance(x, float) and x == x for x in scores
    )
    if not known or len(scores) != len(tokens):
        raise fields.wrong(
            f"{KEY}scores", scores, f"{len(tokens)} numbers, one for each token"
        )
    unknown = fields.integer(f"{KEY}unknown_token_id", 0, low=0, high=len(tokens) - 1)
    inner = _bpe(
        fields,
        tokens,
        _merges(tokens, types, scores),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    prefix = fields.flag(f"{KEY}add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), spaces] if prefix else [spaces]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1, right=0)] if prefix else []),
        ]
    )
    return inner


def _merges(
    tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Every way to make a token of text from two others, the best token first.

    No control token is made: those are written by templates only.
    """
    made = {
        token: n
        for n, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (NORMAL, USER_DEFINED)
    }
    order = sorted(made, key=lambda token: (-scores[made[token]], made[token]))
    return [
        (token[:middle], token[middle:])
        for token in order
        for middle in range(1, len(token))
        if token[:middle] in made and token[middle:] in made
    ]


def _bpe(
    fields: ConfigFields,
    tokens: list[str],
    merges: list[tuple[str, ...]],
    **settings: Any,
) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, **settings)
    except Exception as error:  # The library raises nothing more specific.
        raise UserError(
            f"{fields.where}: {KEY}merges do not fit the tokens: {error}"
        ) from error
    return tokenizers.Tokenizer(model)
