"""Answers of the engine in the shapes of OpenAI's API, whole or as a stream."""

import dataclasses
import functools
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from research.engine.requests import Piece, TokenScore
from research.tokenize.tokenizer import Tokenizer

PING = b": ping\n\n"  # A comment, which keeps proxies and SSH from closing.
DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0  # JSON has no infinity.
MOST_REMEMBERED = 1 << 17  # texts of tokens

Fields = dict[str, Any]


def event(fields: Mapping[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: %b\n\n" % msgspec.json.encode(fields)


@dataclasses.dataclass
class AnswerPart:
    """One answer of a request, as far as it has come.

    Attributes:
      index: of the choice.
      prompt: ids.
      text, ids, scores: of the answer.
      prompt_scores: of `prompt[1:]`, with `echo`.
      finish: why it ended; "" until then.
      cached: tokens of the prompt that were in the prefix cache.
      offset: characters of the answer that an earlier chunk of a stream holds.
    """

    index: int
    prompt: tuple[int, ...] = ()
    text: str = ""
    ids: list[int] = dataclasses.field(default_factory=list)
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    prompt_scores: tuple[TokenScore, ...] = ()
    finish: str = ""
    cached: int = 0
    offset: int = 0

    def add(self, piece: Piece) -> None:
        """Appends the next piece."""
        self.text += piece.text
        self.ids += piece.ids
        self.scores += piece.logprobs
        self.prompt_scores = self.prompt_scores or piece.prompt_logprobs
        self.cached = self.cached or piece.cached_tokens
        self.finish = piece.finish


def usage(parts: Sequence[AnswerPart], choices: int) -> Fields:
    """Counts of tokens; `choices` answers share a prompt, which counts once."""
    prompts = sum(len(part.prompt) for part in parts[::choices])
    new = sum(len(part.ids) for part in parts)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": new,
        "total_tokens": prompts + new,
        "prompt_tokens_details": {
            "cached_tokens": sum(part.cached for part in parts[::choices])
        },
    }


class TokenTexts:
    """The texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # Some decoders drop a blank at the start of a text, so there is one before.
        self._lead = tokenizer.encode_texts(["a"])[0]
        self._lead_text = tokenizer.decode(self._lead, skip_control=False)
        self.whole = functools.lru_cache(MOST_REMEMBERED)(self._whole)

    def _whole(self, token: int) -> str | None:
        """The text of a token; None if it is a part of a character."""
        text = self._tokenizer.decode([*self._lead, token], skip_control=False)
        text = text.removeprefix(self._lead_text)
        return None if "\ufffd" in text else text

    def text(self, ids: Sequence[int]) -> str:
        """The text of several tokens, control tokens included."""
        return self._tokenizer.decode(ids, skip_control=False)

    def name(self, token: int) -> str:
        """Its text, or `token_id:ID` if it is a part of a character."""
        text = self.whole(token)
        return f"token_id:{token}" if text is None else text

    def names(self, score: TokenScore) -> dict[str, float]:
        """The alternatives of a score by name, the token itself among them.

        Two ids may have one text: the first of them has it as its name.
        """
        found = {self.name(score.id): _written(score.logprob)}
        for token, logprob in score.top:
            if token != score.id:
                name = self.name(token)
                name = f"token_id:{token}" if name in found else name
                found[name] = _written(logprob)
        return found


def _written(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


@dataclasses.dataclass(frozen=True)
class AnswerShape:
    """The fields that all objects of one answer share; a subclass is a kind of answer.

    Attributes:
      model: its name.
      fingerprint: of what decides the answers: base, adapter, code and number format.
      texts: of tokens.
      with_ids: adds the ids of prompt and answer.
      with_scores: adds log-probabilities.
      echo: puts the prompt in front.
      prefix: of the answer's id.
    """

    model: str
    fingerprint: str
    texts: TokenTexts
    with_ids: bool = False
    with_scores: bool = False
    echo: bool = False
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    prefix = object = chunk_object = ""

    def whole(self, parts: Sequence[AnswerPart], choices: int) -> Fields:
        """The answer in one object."""
        found = [
            self._choice(part.index, self._content(part), part, part.finish)
            | ({"prompt_token_ids": part.prompt} if self.with_ids else {})
            for part in parts
        ]
        return self._head(self.object) | {
            "choices": found,
            "usage": usage(parts, choices),
        }

    def chunk(self, part: AnswerPart, with_usage: bool, finish: str | None) -> Fields:
        """One object of a stream, with what is new in a part."""
        choice = self._choice(part.index, self._delta(part), part, finish)
        return self._chunk([choice], with_usage)

    def opening(self, part: AnswerPart, with_usage: bool) -> Fields | None:
        """The first object of a part; None if there is none."""
        return None

    def closing(self, counts: Fields) -> Fields:
        """The last object of a stream that ends with its counts of tokens."""
        return self._head(self.chunk_object) | {"choices": [], "usage": counts}

    def _chunk(self, choices: list[Fields], with_usage: bool) -> Fields:
        # With counts at the end, every object before it has none.
        counts: Fields = {"usage": None} if with_usage else {}
        return self._head(self.chunk_object) | {"choices": choices} | counts

    def _head(self, kind: str) -> Fields:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _choice(
        self, index: int, content: Fields, part: AnswerPart, finish: str | None
    ) -> Fields:
        return {
            "index": index,
            **content,
            "logprobs": self._logprobs(part) if self.with_scores else None,
            "finish_reason": finish or None,
            **({"token_ids": part.ids} if self.with_ids else {}),
        }

    def _content(self, part: AnswerPart) -> Fields:
        raise NotImplementedError

    def _delta(self, part: AnswerPart) -> Fields:
        raise NotImplementedError

    def _logprobs(self, part: AnswerPart) -> Fields:
        raise NotImplementedError


class ChatShape(AnswerShape):
    """Answers of `/v1/chat/completions`."""

    prefix, object = "chatcmpl", "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, part: AnswerPart, with_usage: bool) -> Fields:
        delta = {"role": "assistant", "content": ""}
        choice = {"index": part.index, "delta": delta, "finish_reason": None}
        return self._chunk([choice | {"logprobs": None}], with_usage)

    def _content(self, part: AnswerPart) -> Fields:
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"message": message}

    def _delta(self, part: AnswerPart) -> Fields:
        return {"delta": {"content": part.text} if part.text else {}}

    def _logprobs(self, part: AnswerPart) -> Fields:
        return {"content": [self._score(score) for score in part.scores]}

    def _score(self, score: TokenScore) -> Fields:
        fields = self._named(score.id, score.logprob)
        return fields | {"top_logprobs": [self._named(*each) for each in score.top]}

    def _named(self, token: int, logprob: float) -> Fields:
        text = self.texts.whole(token)
        return {
            "token": self.texts.name(token),
            "bytes": None if text is None else list(text.encode()),
            "logprob": _written(logprob),
        }


class CompletionShape(AnswerShape):
    """Answers of `/v1/completions`."""

    prefix, object = "cmpl", "text_completion"
    chunk_object = "text_completion"

    def _content(self, part: AnswerPart) -> Fields:
        return {"text": self._echoed(part) + part.text}

    _delta = _content

    def _echoed(self, part: AnswerPart) -> str:
        if not self.echo or not part.prompt:
            return ""
        return self.texts.text(part.prompt)

    def _logprobs(self, part: AnswerPart) -> Fields:
        scores: list[TokenScore | None] = [*part.scores]
        ids = [*part.ids]
        if self.echo and part.prompt:
            # Nothing stands before the first token, so it has no score.
            scores = [None, *part.prompt_scores, *scores]
            ids = [*part.prompt, *ids]
        tokens = [self.texts.name(token) for token in ids]
        offsets, place = [], part.offset
        for token in ids:
            offsets.append(place)
            place += len(self.texts.whole(token) or "")
        return {
            "tokens": tokens,
            "token_logprobs": [s and _written(s.logprob) for s in scores],
            "top_logprobs": [s and self.texts.names(s) for s in scores],
            "text_offset": offsets,
        }
