"""Text to ids and back, with control tokens kept apart from text.

A tokenizer here is always a Hugging Face `tokenizers.Tokenizer`, read from a
`tokenizer.json` or built by `gguf.gguf_tokenizer` or `tokenizer_training`.
"""

import copy
import enum
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from research.core.errors import UserError
from research.models.families.config_fields import ConfigFields, is_text
from research.tokenize.carried_settings import (
    kept_settings,
    read_fields,
    read_generation,
    special_texts,
)
from research.tokenize.text_view import MARK, make_text_view

SETTINGS = "tokenizer_config.json"
END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Before(enum.Enum):
    """The front of a stretch of text, on which its first ids can depend."""

    NOTHING = enum.auto()
    CONTROL = enum.auto()
    TEXT = enum.auto()


class Tokenizer:
    """Two views of one vocabulary: for text, and for templates.

    In text, `<|im_end|>` is ten ordinary characters; in a template it is the control
    token. So no row of data can forge the structure around its text. Added tokens that
    are not special, such as `<think>`, are ordinary words in both views.

    Attributes:
      bos, eos: ids, or None if the model has none.
      end_ids: ids at which an answer ends; `eos` is one of them.
      add_bos: whether a document of plain text starts with `bos`.
      chat_template: the model's own Jinja template, or "".
      control_ids: of `bos`, `eos` and all special tokens: only templates write them.
      fingerprint: sha256 over vocabulary, rules and template.
      settings: more fields of `tokenizer_config.json`, for an export.
      generation: fields of `generation_config.json`, for an export.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        bos: str | None,
        eos: str | None,
        add_bos: bool = False,
        chat_template: str = "",
        embeddings: int | None = None,
        settings: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        end_ids: Iterable[int] = (),
    ):
        """Reads the rules of `inner`.

        Args:
          inner: the vocabulary and its rules.
          bos, eos: names of tokens, or None.
          add_bos: see the class.
          chat_template: see the class.
          embeddings: see `within`; None if every token has one.
          settings, generation: see the class.
          end_ids: more ids than `eos` at which an answer ends.
        """
        inner.no_padding()
        inner.no_truncation()
        vocabulary = inner.get_vocab(with_added_tokens=True)
        ends = [name for name in (bos, eos) if name in vocabulary]
        inner.add_special_tokens([n for n in ends if not _is_added(inner, n)])
        serialized = inner.to_str()
        self._template_view = inner
        self._embeddings = embeddings or self.largest_id + 1
        self.settings, self.generation = settings or {}, generation or {}
        special = special_texts(self.settings)
        added = inner.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.control_ids = frozenset(
            i
            for i, token in added.items()
            if token.special
            or token.content in (bos, eos, *special)
            or i >= self._embeddings
        )
        self._text_view = make_text_view(serialized, self.control_ids)
        self._leads = _find_leads(inner)
        self.bos_token, self.eos_token = bos or "", eos or ""
        self.bos = inner.token_to_id(bos) if bos else None
        self.eos = inner.token_to_id(eos) if eos else None
        ends = (*end_ids, self.eos)
        self.end_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        self.add_bos = add_bos and self.bos is not None
        self.chat_template = chat_template
        parts = (serialized, chat_template, self.bos_token, self.eos_token)
        self.fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def with_chat_template(
        self, template: str, end_ids: Iterable[int] = ()
    ) -> "Tokenizer":
        """The same vocabulary and rules, with another chat template.

        Args:
          template: the new one.
          end_ids: more ids at which its answers end.
        """
        ends = (*self.end_ids, *end_ids)
        return self._copy(template, self._embeddings, ends)

    def within(self, embeddings: int) -> "Tokenizer":
        """The same tokenizer for a model with so many embeddings.

        Some models have added tokens without one, such as `<pad>`. In text they are
        letters, and a template that writes one is refused.

        Raises:
          UserError: other tokens have none.
        """
        if ends := [i for i in self.end_ids if i != self.eos and i >= embeddings]:
            raise UserError(
                f"eos_token_id in the generation_config.json or config.json of the "
                f"model names {ends[0]}, and the model has ids up to {embeddings - 1}; "
                "correct that field"
            )
        if self.largest_id < embeddings:
            return self
        ids = self._template_view.get_vocab(with_added_tokens=True).values()
        above = {i for i in ids if i >= embeddings}
        if not above <= self._added_ids or above & {self.bos, self.eos}:
            raise UserError(
                f"the tokenizer has ids up to {self.largest_id} and the model "
                f"{embeddings} of them: they do not belong together"
            )
        return self._copy(self.chat_template, embeddings, self.end_ids)

    def _copy(
        self, template: str, embeddings: int, end_ids: Iterable[int]
    ) -> "Tokenizer":
        return Tokenizer(
            tokenizers.Tokenizer.from_str(self._template_view.to_str()),
            bos=self.bos_token or None,
            eos=self.eos_token or None,
            add_bos=self.add_bos,
            chat_template=template,
            embeddings=embeddings,
            settings=self.settings,
            generation=self.generation,
            end_ids=end_ids,
        )

    @property
    def pad(self) -> int | None:
        """The id of the padding token; None if it has no embedding."""
        found = self._template_view.token_to_id(self.settings.get("pad_token", ""))
        return None if found is None or found >= self._embeddings else found

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added tokens included."""
        return self._template_view.get_vocab_size(with_added_tokens=True)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The id of each token by name, added tokens included."""
        return self._template_view.get_vocab(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """At least `vocab_size - 1`; more if the numbering has gaps."""
        return max(self._template_view.get_vocab(with_added_tokens=True).values())

    def to_json(self) -> str:
        """The content of a `tokenizer.json`."""
        return self._template_view.to_str(pretty=True)

    def encode_texts(
        self, texts: Sequence[str], before: Before = Before.TEXT
    ) -> list[list[int]]:
        """Ids of plain texts; control tokens in them are text, and none is added.

        By default texts are read as the continuation of a line: a SentencePiece
        tokenizer would otherwise write a word boundary in front of each.
        """
        skipped = self._leads[before][1]
        return [encoding.ids[skipped:] for encoding in self._encoded(texts, before)]

    def encode_arrays(self, texts: Sequence[str], dtype: Any) -> list[np.ndarray]:
        """The ids of `encode_texts` as `[n]` arrays, in a fraction of the memory."""
        skipped = self._leads[Before.TEXT][1]
        return [
            np.array(encoding.ids, dtype)[skipped:]
            for encoding in self._encoded(texts, Before.TEXT)
        ]

    def _encoded(
        self, texts: Sequence[str], before: Before
    ) -> list[tokenizers.Encoding]:
        led = [self._leads[before][0] + text for text in texts]
        return self._text_view.encode_batch_fast(led, add_special_tokens=False)

    def read_back(self, text: str) -> str:
        """The text that the ids of a text stand for; the same unless some is lost."""
        lead, _ = self._leads[Before.TEXT]
        ids = self._text_view.encode(lead + text, add_special_tokens=False).ids
        return self.decode(ids).removeprefix(lead)

    def find_added(self, words: str) -> list[tuple[int, int, int]]:
        """Id, start and end of each added token in the words of a template.

        Some added tokens take the white space beside them in.

        Raises:
          UserError: the model has no embedding for one.
        """
        encoding = self._template_view.encode(words, add_special_tokens=False)
        found = [
            (i, start, end)
            for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if i in self._added_ids and words[start:end].strip()
        ]
        for i, start, end in found:
            if i >= self._embeddings:
                raise UserError(
                    f"the chat template writes {words[start:end]!r}, for which the "
                    "model has no embedding; use --config.data.template=dolly"
                )
        return found

    def decode(self, ids: Sequence[int], *, skip_control: bool = True) -> str:
        """The text of `ids`, by default without control tokens."""
        return self._template_view.decode(list(ids), skip_special_tokens=skip_control)


def _find_leads(inner: tokenizers.Tokenizer) -> dict[Before, tuple[str, int]]:
    """Text to write in front of a text, and the number of its ids, to be dropped.

    Some tokenizers write a word boundary at the start of a text: a line break goes in
    front of it.
    """
    alone, after = (inner.encode(x, add_special_tokens=False) for x in "a\n")
    both = inner.encode("\na", add_special_tokens=False).ids
    marks_starts = both[len(after.ids) :] != alone.ids
    return {
        Before.NOTHING: ("", 0),
        Before.CONTROL: (MARK, 1),
        Before.TEXT: ("\n", len(after.ids)) if marks_starts else ("", 0),
    }


def _is_added(inner: tokenizers.Tokenizer, name: str) -> bool:
    return any(t.content == name for t in inner.get_added_tokens_decoder().values())


def from_folder(folder: Path) -> Tokenizer:
    """Reads a Hugging Face model folder's tokenizer.

    Raises:
      UserError: it has none, or none that can be read without running its code.
    """
    settings = read_fields(folder / SETTINGS)
    file = folder / "tokenizer.json"
    inner = _from_file(file) if file.is_file() else _converted(folder)
    template = _own_template(settings)
    if (file := folder / "chat_template.jinja").is_file():
        try:
            template = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
    generation, ends = read_generation(folder)
    return _with_marks(inner, settings, template, generation, ends)


def from_file(file: Path) -> Tokenizer:
    """Reads a `tokenizer.json` of any name, for text without templates.

    A `tokenizer_config.json` beside it names the tokens that begin and end a document.
    Without one, a token whose name is in `END_NAMES` ends it.

    Raises:
      UserError: the file cannot be read, or has no token that ends a document.
    """
    inner = _from_file(file)
    settings = read_fields(file.parent / SETTINGS)
    if settings.get("eos_token") is None:
        added = {token.content for token in inner.get_added_tokens_decoder().values()}
        eos = next((name for name in END_NAMES if name in added), None)
        if eos is None:
            raise UserError(
                f"{file} has no token that ends a document, such as {END_NAMES[0]}; "
                'put a tokenizer_config.json with an "eos_token" beside it'
            )
        settings = ConfigFields(
            {"bos_token": settings.get("bos_token"), "eos_token": eos}, settings.where
        )
    return _with_marks(inner, settings, "")


def _with_marks(
    inner: tokenizers.Tokenizer,
    settings: ConfigFields,
    template: str,
    generation: Mapping[str, Any] | None = None,
    end_ids: Iterable[int] = (),
) -> Tokenizer:
    bos, eos = (_named_token(settings, k, inner) for k in ("bos_token", "eos_token"))
    sample = inner.encode("a").ids
    return Tokenizer(
        inner,
        bos=bos,
        eos=eos,
        add_bos=bool(bos) and sample[:1] == [inner.token_to_id(bos)],
        chat_template=template,
        settings=kept_settings(settings),
        generation=generation,
        end_ids=end_ids,
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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # The library raises nothing more specific.
        raise UserError(f"{file} is not a tokenizer: {error}") from error


def _own_template(settings: ConfigFields) -> str:
    """The template, or the one called default of several; "" if there is none."""
    template = settings.get("chat_template", "")
    if is_text(template):
        return template
    named = template if isinstance(template, list) else [template]
    if not all(
        isinstance(t, dict) and is_text(t.get("name")) and is_text(t.get("template"))
        for t in named
    ):
        raise settings.wrong(
            "chat_template", template, "text, or a list of {name, template} texts"
        )
    return {t["name"]: t["template"] for t in named}.get("default", "")


def _named_token(
    settings: ConfigFields, name: str, inner: tokenizers.Tokenizer
) -> str | None:
    """The token that a field names, as text or as an object with its content."""
    value = settings.get(name)
    token = value.get("content") if isinstance(value, dict) else value
    if token is None and value is None:
        return None
    if not is_text(token) or inner.token_to_id(token) is None:
        raise settings.wrong(name, value, "null, or the text of a token that there is")
    return token
