"""Text to ids and back, with control tokens kept apart from text.

A tokenizer here is always a Hugging Face `tokenizers.Tokenizer`, read from a
`tokenizer.json` or built from the metadata of a GGUF file.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from research.core.errors import UserError

# How Llama 3 splits text before byte-pair encoding, from its tokenizer.json.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
GGUF_CONTROL = 3
GGUF_USER_DEFINED = 4


class Tokenizer:
    """Two views of one vocabulary: for text, and for templates.

    In text, `<|im_end|>` is ten ordinary characters; in a template it is the control
    token. So no row of data can forge the structure around its text.

    Attributes:
      bos, eos: ids, or None if the model has none.
      add_bos: whether a document of plain text starts with `bos`.
      chat_template: the model's own Jinja template, or "".
      fingerprint: sha256 over vocabulary, rules and template.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: str | None,
        add_bos: bool = False,
        chat_template: str = "",
    ):
        inner.no_padding()
        inner.no_truncation()
        serialized = inner.to_str()
        self._template_view = inner
        self._text_view = _without_control_tokens(serialized)
        # Some tokenizers treat the start of a text as special: a line break goes in
        # front of it, whose ids are dropped.
        alone, after = (inner.encode(x, add_special_tokens=False) for x in "a\n")
        both = inner.encode("\na", add_special_tokens=False).ids
        marks_starts = both[len(after.ids) :] != alone.ids
        self._lead = "\n" if marks_starts else ""
        self._lead_ids = len(after.ids) if marks_starts else 0
        self.bos_token, self.eos_token = bos or "", eos or ""
        self.bos = inner.token_to_id(bos) if bos else None
        self.eos = inner.token_to_id(eos) if eos else None
        self.add_bos = add_bos and self.bos is not None
        self.chat_template = chat_template
        self.control_ids = frozenset(
            i for i, token in inner.get_added_tokens_decoder().items() if token.special
        )
        parts = (serialized, chat_template, self.bos_token, self.eos_token)
        self.fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same vocabulary and rules, with another chat template."""
        return Tokenizer(
            tokenizers.Tokenizer.from_str(self._template_view.to_str()),
            bos=self.bos_token or None,
            eos=self.eos_token or None,
            add_bos=self.add_bos,
            chat_template=template,
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added tokens included."""
        return self._template_view.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """At least `vocab_size - 1`; more if the numbering has gaps."""
        return max(self._template_view.get_vocab(with_added_tokens=True).values())

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._template_view.to_str(pretty=True)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts; control tokens in them are text, and none is added.

        Texts are read as the continuation of a line: a SentencePiece tokenizer would
        otherwise write a word boundary in front of each.
        """
        return [encoding.ids[self._lead_ids :] for encoding in self._encoded(texts)]

    def encode_arrays(self, texts: Sequence[str], dtype: Any) -> list[np.ndarray]:
        """The ids of `encode_texts` as `[n]` arrays, in a fraction of the memory."""
        return [
            np.array(encoding.ids, dtype)[self._lead_ids :]
            for encoding in self._encoded(texts)
        ]

    def _encoded(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        led = [self._lead + text for text in texts]
        return self._text_view.encode_batch_fast(led, add_special_tokens=False)

    def encode_template(self, text: str, *, first: bool = False) -> list[int]:
        """Ids of a template's own words, in which control tokens are parsed.

        Args:
          text: the words.
          first: whether they open the document; or else they continue a line.
        """
        lead, skipped = ("", 0) if first else (self._lead, self._lead_ids)
        led = self._template_view.encode(lead + text, add_special_tokens=False)
        return led.ids[skipped:]

    def decode(self, ids: Sequence[int], *, skip_control: bool = True) -> str:
        """The text of `ids`, by default without control tokens."""
        return self._template_view.decode(list(ids), skip_special_tokens=skip_control)


def _without_control_tokens(serialized: str) -> tokenizers.Tokenizer:
    """A copy that reads every added token as the characters of its name."""
    rules = json.loads(serialized)
    for token in rules.get("added_tokens", ()):
        token["special"] = True
    view = tokenizers.Tokenizer.from_str(json.dumps(rules))
    view.encode_special_tokens = True
    return view


def from_folder(folder: Path) -> Tokenizer:
    """Reads a Hugging Face model folder's tokenizer.

    Raises:
      UserError: it has none, or none that can be read without running its code.
    """
    settings = _read_json(folder / "tokenizer_config.json")
    file = folder / "tokenizer.json"
    inner = _from_file(file) if file.is_file() else _converted(folder)
    template = settings.get("chat_template") or ""
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default", "")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    bos, eos = (_token_text(settings.get(k)) for k in ("bos_token", "eos_token"))
    return _with_marks(inner, bos, eos, template)


def from_file(file: Path) -> Tokenizer:
    """Reads a `tokenizer.json` of any name, for text without templates.

    A `tokenizer_config.json` beside it names the tokens that begin and end a document.
    Without one, a token whose name is in `END_NAMES` ends it.

    Raises:
      UserError: the file cannot be read, or has no token that ends a document.
    """
    settings = _read_json(file.with_name("tokenizer_config.json"))
    bos, eos = (_token_text(settings.get(k)) for k in ("bos_token", "eos_token"))
    inner = _from_file(file)
    if eos is None:
        added = {token.content for token in inner.get_added_tokens_decoder().values()}
        eos = next((name for name in END_NAMES if name in added), None)
    if eos is None:
        raise UserError(
            f"{file} has no token that ends a document, such as {END_NAMES[0]}; put a "
            'tokenizer_config.json with an "eos_token" beside it'
        )
    return _with_marks(inner, bos, eos, "")


def _with_marks(
    inner: tokenizers.Tokenizer, bos: str | None, eos: str | None, template: str
) -> Tokenizer:
    sample = inner.encode("a").ids
    return Tokenizer(
        inner,
        bos=bos,
        eos=eos,
        add_bos=bool(bos) and sample[:1] == [inner.token_to_id(bos)],
        chat_template=template,
    )


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """A folder with only a SentencePiece model; transformers knows how to convert."""
    try:
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        return copy.deepcopy(loaded.backend_tokenizer)
    except Exception as error:  # Its converters raise whatever their parsers raise.
        raise UserError(
            f"{folder} has no tokenizer.json, and transformers cannot convert the "
            f"files there ({error}); save one with tokenizer.save_pretrained()"
        ) from error


def _from_file(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises nothing more specific.
        raise UserError(f"{file} is not a tokenizer: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is not a JSON object: {error}") from error


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def from_gguf_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds a byte-level BPE tokenizer from a GGUF file's `tokenizer.*` keys.

    Raises:
      UserError: the file's tokenizer is of another kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    cut = metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or cut not in _pre_tokenizers():
        raise UserError(
            f"the GGUF file's tokenizer is {kind!r} and splits text as {cut!r}; gpt2 "
            f"(byte-level BPE) that splits as {', '.join(_pre_tokenizers())} can be "
            "built. Use the model's Hugging Face folder instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
    )
    inner.pre_tokenizer = _pre_tokenizers()[cut]
    inner.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    for wanted, special in ((GGUF_CONTROL, True), (GGUF_USER_DEFINED, False)):
        added = [t for t, k in zip(tokens, types, strict=True) if k == wanted]
        inner.add_tokens(
            [tokenizers.AddedToken(t, special=special, normalized=False) for t in added]
        )

    def named(key: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return None if index is None else tokens[index]

    return Tokenizer(
        inner,
        bos=named("bos"),
        eos=named("eos"),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", False)),
        chat_template=metadata.get("tokenizer.chat_template", ""),
    )


def _pre_tokenizers() -> dict[str, pre_tokenizers.PreTokenizer]:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    llama3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    digits = pre_tokenizers.Digits(individual_digits=True)
    return {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([digits, byte_level]),
        "llama-bpe": llama3,
    }
