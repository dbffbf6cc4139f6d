"""Tools and their calls in rows, in the form that chat templates read.

The form is that of OpenAI and transformers: `{"type": "function", "function": {"name",
"arguments"}}`. Arguments are an object there, and often JSON text in rows.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.tokenize.conversation import CALLS, TOOLS, Turn

OLD_CALL = "function_call"  # OpenAI's first name of it, for one call.
# ShareGPT's roles whose text is a call.
CALLING_ROLES = ("function_call", "tool_call")
CONTENT = ("content", "value")


def read_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message; none in most.

    Raises:
      ValueError: a call has no name, or its arguments are no JSON object.
    """
    is_call = (message.get("role") or message.get("from")) in CALLING_ROLES
    names = (CALLS, OLD_CALL, *(CONTENT if is_call else ()))
    given = next((message[k] for k in names if _is_set(message.get(k))), None)
    given = _parsed(given, "a call" if is_call else CALLS)
    if not is_call and not _is_set(given):
        return []
    listed = given if isinstance(given, list) else [given]
    return [_call(_parsed(each, "a call")) for each in listed]


def read_result(message: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a tool's result: the name of the tool, and the id of the call."""
    name = message.get("name")
    key = _as_id(message.get("tool_call_id"))
    return {"name": name if _is_set(name) else None, "tool_call_id": key}


def _call(given: Any) -> dict[str, Any]:
    outer = given if isinstance(given, dict) else {}
    inner = outer.get("function") or outer
    inner = {**outer, "name": inner} if isinstance(inner, str) else inner
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"a call of a tool has no name: {given!r:.80}")
    found = (inner.get(key) for key in ("arguments", "parameters"))
    arguments = next((each for each in found if each is not None), None)
    arguments = _parsed(arguments, f"the arguments of the call of {name!r}")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise ValueError(
            f"the arguments of the call of {name!r} are {arguments!r:.80}, not an "
            "object of names and values"
        )
    function = {"name": name, "arguments": arguments}
    key = _as_id(outer.get("id"))
    own = {"id": key} if key else {}
    return {**own, "type": "function", "function": function}


def read_tools(given: Any) -> list[dict[str, Any]]:
    """The tools of a row, from a list of their descriptions or from its JSON text.

    A column that is empty, or whose text is, has none.

    Raises:
      ValueError: they are something else.
    """
    found = _parsed(given, f"column {TOOLS!r}")
    if not _is_set(found):
        return []
    tools = [
        {"type": "function", "function": tool}
        if isinstance(tool, dict) and "name" in tool
        else tool
        for tool in (found if isinstance(found, list) else [found])
    ]
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"column {TOOLS!r} has {tool!r:.80}; it must list the functions that "
                "can be called, each with a name, a description and parameters. If it "
                f"is something else: --config.data.columns.ignored=\"('{TOOLS}',)\""
            )
    return tools


def describes(text: str, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a system text has the JSON of all tools, as in Hermes' data."""
    names = [re.escape(tool["function"]["name"]) for tool in tools]
    return all(re.search(rf'"name":\s*"{name}"', text) for name in names)


def check_results(turns: Sequence[Turn]) -> None:
    """Raises ValueError if a result of a tool has no call.

    An answer may write its call as text, with the name of the tool. Where a row has
    neither a list of tools nor a field of calls, nothing is known about its texts.
    """
    known = [turn.read_fields() for turn in turns]
    if not any(fields.keys() & {CALLS, TOOLS} for fields in known):
        return
    tools = [tool for fields in known for tool in fields.get(TOOLS, [])]
    open_calls: list[dict[str, Any]] = []
    is_text = False
    for number, (turn, fields) in enumerate(zip(turns, known, strict=True), 1):
        if turn.role != "tool":
            open_calls = fields.get(CALLS, [])
            is_text = any(tool["function"]["name"] in turn.text for tool in tools)
            continue
        if is_text and not open_calls:
            continue
        key = fields.get("tool_call_id")
        ids = [call.get("id") for call in open_calls]
        if not open_calls or (key and any(ids) and key not in ids):
            raise ValueError(
                f"message {number} is the result of a tool, and no call before it "
                f"{f'has the id {key!r}' if open_calls else 'waits for one'}"
            )
        answered = ids.index(key) if key in ids else 0
        open_calls = open_calls[:answered] + open_calls[answered + 1 :]


def _is_set(value: Any) -> bool:
    """Tables have NaN in an empty cell, or an object in which nothing is set."""
    if isinstance(value, dict):
        return any(each is not None for each in value.values())
    return bool(value) and value == value


def _as_id(given: Any) -> str | None:
    """Ids of calls are texts in templates; a row may number them."""
    return None if given in (None, "") or given != given else str(given)


def _parsed(given: Any, what: str) -> Any:
    """The value of JSON text, None of blank text; what is no text stays.

    Raises:
      ValueError: the text is not JSON, or names a key twice in an object.
    """
    if not isinstance(given, str):
        return given
    if not given.strip():
        return None
    try:
        return json.loads(given, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}, {given!r:.80}, is not JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has two keys of one name")
    return found
