"""Errors of the API, in the shape that OpenAI's clients read."""

import math
from collections.abc import Iterable

import msgspec
from starlette.responses import Response

from research.core.errors import LonelyError, UserError, nearest
from research.engine.requests import (
    ContextOverflowError,
    EngineFullError,
    EngineStoppedError,
    OtherProcessError,
    UnknownAdapterError,
)

LISTED = 20  # names in a message
# The rest of the body may still come, and nothing can follow it on the connection.
BODY_UNREAD = (408, 413)
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class ApiError(Exception):
    """An answer other than success.

    Attributes:
      status: of HTTP.
      message: what was requested, what was found, what to do.
      param: the field of the request that is to blame, such as `messages[0].role`.
      code: a word for programs, such as `context_length_exceeded`.
      retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code, self.retry_after = code, retry_after

    def body(self) -> dict[str, object]:
        """The object that stands in a response, or in a stream after its status."""
        kind = TYPES.get(self.status, "invalid_request_error")
        fields = {"message": self.message, "type": kind}
        return {"error": fields | {"param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response; a client retries by the header `Retry-After`."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status in BODY_UNREAD:
            headers["connection"] = "close"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        body = msgspec.json.encode(self.body())
        return Response(body, self.status, headers, "application/json")


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """400: the request cannot be answered, whoever sends it."""
    return ApiError(400, message, param, code)


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    """404: lists the models that there are."""
    names = list(known)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    listed = ", ".join(names[:LISTED]) + more or "those that are loaded: none is"
    shown = name if len(name) <= 100 else f"{name[:100]}..."
    return ApiError(
        404,
        f"model {shown!r} is not served{nearest(shown, names)}; it must be one of "
        f"{listed}",
        "model",
        "model_not_found",
    )


def stopping() -> ApiError:
    """503: the server is about to end."""
    return ApiError(
        503, "the server stops and takes no new requests", None, "stopping", 5
    )


# The names that the engine and the API have for one field.
ENGINE_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_ids": "stop_token_ids",
}


def from_engine(error: UserError, prompt: str) -> ApiError:
    """The error of the API for one that `Engine.submit` raises.

    The engine's message about a field begins with the name of the field and a colon.
    `prompt` is the field of the request that holds the prompt.
    """
    message = str(error)
    if isinstance(error, OtherProcessError):
        return ApiError(503, message, None, "other_process")
    if isinstance(error, LonelyError | EngineStoppedError):
        return ApiError(503, message, None, "stopped")
    for theirs, ours in ENGINE_NAMES.items():
        message = message.replace(theirs, ours)
    if isinstance(error, EngineFullError):
        code = "queue_full"
        return ApiError(429, message, None, code, error.retry_after)
    if isinstance(error, ContextOverflowError):
        return bad_request(message, prompt, "context_length_exceeded")
    if isinstance(error, UnknownAdapterError):
        return ApiError(404, message, "model", "model_not_found")
    name, colon, _ = message.partition(":")
    return bad_request(message, name if colon and name.isidentifier() else None)
