"""The requests of the API: their fields, types and ranges, and how they are read.

msgspec checks types by declaration and names the place of a mismatch. It is one wheel
without dependencies. pydantic, the usual choice, brings two more, and its messages
would have to be rewritten.
"""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from research.engine.requests import MOST_ALTERNATIVES
from research.serve.api.api_errors import ApiError, bad_request

T = TypeVar("T", bound=msgspec.Struct)
MOST_CHOICES = 128  # of `n`, as in OpenAI's API
MOST_STOPS = 16
MOST_SHOWN = 20  # unknown fields in the header
HEADER_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
PLACE = re.compile(r" - at `(?P<key>key` in `)?\$\.?(?P<path>[^`]*)`$")

Share = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Id = Annotated[int, Meta(ge=0, lt=2**31)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Alternatives = Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)]
Name = Annotated[str, Meta(min_length=1)]
StopText = Annotated[str, Meta(min_length=1)]


class StreamOptions(msgspec.Struct, frozen=True):
    """Wishes about a stream beside the answer."""

    include_usage: bool | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message; only those of type `text` can be read."""

    type: str
    text: str = ""


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None


class SamplingFields(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both ways of asking have; null is the same as no field."""

    model: Name
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[Id, Bias] | None = None
    seed: int | None = None
    stop: str | Annotated[list[StopText], Meta(max_length=MOST_STOPS)] | None = None
    stop_token_ids: Annotated[list[Id], Meta(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Id | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = None
    user: str | None = None

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if isinstance(self.stop, str):
            return (self.stop,) if self.stop else ()
        return tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    context: str | None = None  # As that of a training row; ours alone.
    max_completion_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None

    def check(self) -> None:
        """Raises ApiError for fields that do not fit each other, or to this server."""
        if self.tools and self.tool_choice != "none":
            raise bad_request("tools are not supported: drop the field", "tools")
        if self.functions:
            raise bad_request("functions are not supported: drop them", "functions")
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
        _check_messages(self.messages)


class CompletionRequest(SamplingFields, frozen=True, kw_only=True):
    """The body of `/v1/completions`; a prompt is text or ids."""

    # msgspec cannot tell lists of two kinds apart: `prompts` checks the items.
    prompt: str | Annotated[list[Any], Meta(min_length=1)]
    max_tokens: Id | None = None
    logprobs: Alternatives | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises ApiError: an item is neither text nor ids."""
        kinds = (str, list[str], list[list[Id]], list[Id])
        for kind in kinds:
            try:
                found = msgspec.convert(self.prompt, kind, strict=True)
            except msgspec.ValidationError as error:
                problem = error
            else:
                return [found] if kind in (str, list[Id]) else found
        *_, where = str(problem).partition(" - at `$")
        raise bad_request(
            "prompt must be text, token ids from 0, or a list of one of these",
            f"prompt{where.rstrip('`')}",
        )

    def check(self) -> None:
        """Raises ApiError for fields that do not fit each other, or to this server."""
        if self.suffix:
            raise bad_request("suffix is not supported: drop the field", "suffix")
        if self.best_of not in (None, self.n or 1):
            raise bad_request("best_of is not supported: drop the field", "best_of")
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens of 0 needs echo=true", "max_tokens")


class TokenizeRequest(msgspec.Struct, frozen=True):
    """The body of `/tokenize`: text, or messages as a chat puts them to the model."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    context: str | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        """Raises ApiError for messages that are no prompt, or fields too many."""
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        if self.messages is not None:
            _check_messages(self.messages)


class DetokenizeRequest(msgspec.Struct, frozen=True):
    """The body of `/detokenize`."""

    tokens: list[Id]
    model: str | None = None


class LoadAdapterRequest(msgspec.Struct, frozen=True):
    """The body of `/v1/load_lora_adapter`; `lora_path` is a run directory."""

    lora_name: Name
    lora_path: Name
    load_inplace: bool | None = None


class UnloadAdapterRequest(msgspec.Struct, frozen=True):
    """The body of `/v1/unload_lora_adapter`."""

    lora_name: Name


def _check_messages(messages: Sequence[ChatMessage]) -> None:
    """Raises ApiError for a conversation that no answer can follow."""
    if not any(message.role == "user" for message in messages):
        raise bad_request("messages has none of the role user", "messages")
    if messages[-1].role == "assistant":
        last = f"messages[{len(messages) - 1}].role"
        raise bad_request("the last message is an answer; end with a prompt", last)


def message_text(message: ChatMessage, index: int) -> str:
    """The text of message number `index`. Raises ApiError: it has another content."""
    where = f"messages[{index}]"
    if message.tool_calls:
        raise bad_request("tool calls are not supported", f"{where}.tool_calls")
    if message.content is None:
        raise bad_request("a message needs its text", f"{where}.content")
    if isinstance(message.content, str):
        return message.content
    for part, content in enumerate(message.content):
        if content.type != "text":
            raise bad_request(
                f"only parts of type text can be read, not {content.type[:40]!r}",
                f"{where}.content[{part}].type",
            )
    return "".join(content.text for content in message.content)


def read_body(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """The request in `body`.

    Returns:
      The request, and the names of fields that it has and `kind` has not.

    Raises:
      ApiError: the body is no JSON, holds a name twice, or has a field of a wrong type.
    """
    try:
        found = msgspec.json.decode(body)
        # Two programs that take different ones of two equal names can be played off
        # against each other.
        json.loads(body, object_pairs_hook=_unique)
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        deep = isinstance(error, RecursionError)
        cause = "it is nested too deeply" if deep else str(error)
        raise bad_request(f"the body cannot be read as JSON: {cause}", None) from error
    try:
        request = msgspec.convert(found, kind, strict=True, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from error
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    return request, [name for name in found if name not in known]


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that lists unknown fields; none if there are none.

    A name comes from the client: one that could end a header is counted only.
    """
    shown = [name for name in names if HEADER_NAME.fullmatch(name)][:MOST_SHOWN]
    if not names:
        return {}
    if more := len(names) - len(shown):
        shown.append(f"({more} more)")
    return {"x-ignored-fields": ", ".join(shown)}


def _unique(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:40]!r} stands in one object twice")


def _explain(message: str) -> ApiError:
    """The error for a message of msgspec, which ends with a path such as `$.seed`."""
    place = PLACE.search(message)
    said = message[: place.start()] if place else message
    path = place["path"] if place else ""
    if missing := re.match(r"Object missing required field `(\w+)`", said):
        path = f"{path}.{missing[1]}".lstrip(".")
        said = "the field is missing"
    where = f"{path}: " if path else ""
    return bad_request(f"{where}{said[0].lower()}{said[1:]}", path or None)
