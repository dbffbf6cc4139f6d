"""Requests in any shape: read, or refused with the field that is to blame."""

import json
import typing

import msgspec
import pytest

from research.core.errors import LonelyError, UserError
from research.engine.requests import (
    ContextOverflowError,
    EngineFullError,
    EngineStoppedError,
    OtherProcessError,
    UnknownAdapterError,
)
from research.serve.api.api_errors import ApiError, from_engine, unknown_model
from research.serve.api.request_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
    ignored_header,
    message_text,
    read_body,
)

USER = {"role": "user", "content": "hello"}
LEAST = {
    ChatRequest: {"model": "m", "messages": [USER]},
    CompletionRequest: {"model": "m", "prompt": "hello"},
    TokenizeRequest: {"prompt": "hello"},
    DetokenizeRequest: {"tokens": [1]},
    LoadAdapterRequest: {"lora_name": "a", "lora_path": "b"},
    UnloadAdapterRequest: {"lora_name": "a"},
}
VALUES = {
    "text": "x", "number": 1, "fraction": 1.5, "yes": True, "list": [None], "empty": {},
    "deep": {"x": [[{}]]}, "huge": 10**30, "below": -(10**30), "null": None,
}  # fmt: skip
FIELDS = [(kind, field) for kind in LEAST for field in msgspec.structs.fields(kind)]


def read(kind, **changes):
    return read_body(json.dumps(LEAST[kind] | changes).encode(), kind)


def refused(kind, **changes):
    with pytest.raises(ApiError) as caught:
        request, _ = read(kind, **changes)
        request.check()
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("kind", "field"),
    FIELDS,
    ids=lambda x: getattr(x, "__name__", getattr(x, "name", "")),
)
def test_a_field_takes_its_type_and_no_other(kind, field):
    """Whatever is wrong, the error names the field; nothing else is ever raised."""
    accepted = set()
    for name, value in VALUES.items():
        try:
            request, ignored = read(kind, **{field.name: value})
        except ApiError as error:
            assert error.status == 400
            assert error.param.split("[")[0].split(".")[0] == field.name
        else:
            found = getattr(request, field.name)
            # An object has its own class.
            assert not ignored and (found == value or isinstance(value, dict))
            accepted.add(name)
    if field.type is not typing.Any:
        assert len(accepted) < len(VALUES)
    assert ("null" in accepted) == (not field.required)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xff", b"nonsense", b"[1]", b"null", b'"x"', b"{" * 100_000,
        b"[" * 100_000, b'{"model": NaN}', b'{"n": 1e999}', b'{"n": Infinity}',
        b'{"model": "a", "model": "b"}', b'{"messages": [{"role": "a", "role": "b"}]}',
        b'{"model": "\\ud800"}', b'{"model": "\x01"}', b"{'model': 'a'}",
        b"\xef\xbb\xbf{}",
        b'{"n": ' + b"9" * 10_000 + b"}", '{"a": 1}'.encode("utf-16"), b"{} {}",
    ],
    ids=range(20),
)  # fmt: skip
def test_a_body_that_is_no_object_of_json_is_refused(body):
    with pytest.raises(ApiError) as caught:
        read_body(body, ChatRequest)
    assert caught.value.status == 400 and len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("kind", "changes", "param"),
    [
        (ChatRequest, {"temperature": -1}, "temperature"),
        (ChatRequest, {"top_p": 0}, "top_p"),
        (ChatRequest, {"n": 0}, "n"),
        (ChatRequest, {"n": 129}, "n"),
        (ChatRequest, {"max_tokens": 0}, "max_tokens"),
        (ChatRequest, {"stop": [""]}, "stop[0]"),
        (ChatRequest, {"stop": ["x"] * 17}, "stop"),
        (ChatRequest, {"logit_bias": {"1": 101}}, "logit_bias[...]"),
        (ChatRequest, {"logit_bias": {"-1": 1}}, "logit_bias"),
        (ChatRequest, {"messages": []}, "messages"),
        (ChatRequest, {"messages": [{"role": "robot", "content": ""}]},
         "messages[0].role"),
        (ChatRequest, {"messages": [USER, {"role": "assistant", "content": "x"}]},
         "messages[1].role"),
        (ChatRequest, {"messages": [{"role": "system", "content": "x"}]}, "messages"),
        (ChatRequest, {"tools": [{"type": "function"}]}, "tools"),
        (ChatRequest, {"functions": [{}]}, "functions"),
        (ChatRequest, {"top_logprobs": 2}, "top_logprobs"),
        (ChatRequest, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (CompletionRequest, {"suffix": "x"}, "suffix"),
        (CompletionRequest, {"best_of": 3}, "best_of"),
        (CompletionRequest, {"max_tokens": 0}, "max_tokens"),
        (CompletionRequest, {"prompt": []}, "prompt"),
        (TokenizeRequest, {"prompt": None, "messages": []}, "messages"),
        (TokenizeRequest, {"prompt": None}, "prompt"),
        (TokenizeRequest, {"messages": [USER]}, "prompt"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_field(kind, changes, param):
    assert refused(kind, **changes).param == param


def test_tools_that_must_not_be_used_are_no_matter():
    request, _ = read(ChatRequest, tools=[{}], tool_choice="none")
    request.check()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]), ("", [""]),
    ],
)  # fmt: skip
def test_a_prompt_is_text_or_ids_or_many_of_them(prompt, expected):
    assert read(CompletionRequest, prompt=prompt)[0].prompts == expected


@pytest.mark.parametrize("prompt", [[1, "a"], [[1], "a"], [-1], [True], [1.5], [{}]])
def test_a_prompt_of_two_kinds_is_refused(prompt):
    with pytest.raises(ApiError, match="text, token ids") as caught:
        _ = read(CompletionRequest, prompt=prompt)[0].prompts
    assert caught.value.param.startswith("prompt[")


def test_the_text_of_a_message_may_come_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request, _ = read(ChatRequest, messages=[USER | {"content": parts}])
    assert message_text(request.messages[0], 0) == "ab"
    for message, param in (
        (USER | {"content": [{"type": "image_url"}]}, "messages[0].content[0].type"),
        (USER | {"content": None}, "messages[0].content"),
        (USER | {"tool_calls": [{}]}, "messages[0].tool_calls"),
    ):
        request, _ = read(ChatRequest, messages=[message])
        with pytest.raises(ApiError) as caught:
            message_text(request.messages[0], 0)
        assert caught.value.param == param


def test_unknown_fields_are_listed_and_cannot_end_a_header():
    evil = {"a b": 1, "x\r\nSet-Cookie: y": 1, "\u00fc": 1}
    _, ignored = read(ChatRequest, store=True, metadata={}, **evil)
    header = ignored_header(ignored)["x-ignored-fields"]
    assert header == "store, metadata, (3 more)"
    assert ignored_header([]) == {}
    many = ignored_header([f"field{i}" for i in range(1000)])["x-ignored-fields"]
    assert len(many) < 500 and "980 more" in many


def test_the_errors_of_the_engine_become_those_of_the_api():
    full = from_engine(EngineFullError("the queue is full", 2.4), "prompt")
    assert full.status == 429 and full.response().headers["retry-after"] == "3"
    long = from_engine(
        ContextOverflowError("9 prompt tokens ... max_new_tokens"), "messages"
    )
    assert (long.param, long.code) == ("messages", "context_length_exceeded")
    assert long.message.endswith("max_tokens")
    assert from_engine(UnknownAdapterError("no a"), "prompt").status == 404
    for error in (
        LonelyError("one is gone"),
        EngineStoppedError("it has stopped"),
        OtherProcessError("process 1: no such run"),
    ):
        found = from_engine(error, "prompt")
        assert found.status == 503 and found.body()["error"]["param"] is None
        assert found.body()["error"]["type"] == "unavailable_error"
    assert from_engine(UserError("top_k: -2 is not"), "prompt").param == "top_k"
    assert from_engine(UserError("no: name here"), "prompt").param == "no"
    assert from_engine(UserError("it is bad"), "prompt").param is None


def test_an_unknown_model_lists_names_and_nothing_long():
    error = unknown_model("../" * 10_000, [f"run{i}" for i in range(100)])
    assert error.status == 404 and error.param == "model"
    assert unknown_model("x", []).message.endswith("none is")
    assert "run0, run1" in error.message and "80 more" in error.message
    assert len(error.message) < 500
    body = json.loads(error.response().body)
    assert body["error"].keys() == {"message", "type", "param", "code"}
