"""Conversations with calls of tools become the ids that transformers makes."""

import collections
import copy
import dataclasses
import datetime
import json

import pyarrow.parquet
import pytest
from chat_families import CHATML, FAMILIES
from transformers import PreTrainedTokenizerFast

from research.config.data_knobs import ColumnsConfig, DataConfig
from research.core.errors import UserError
from research.data.instructions.row_columns import to_record
from research.data.instructions.row_selection import content_key, load_rows
from research.data.row_readers import BadRowError, TableRow
from research.tokenize.chat_template import ChatFormat, dolly_template
from research.tokenize.tokenizer import Tokenizer

# Qwen 2.5 and Hermes: tags that are ordinary tokens, results in turns of the user.
TAGS = (
    "{% if tools %}<|im_start|>system\n{{ messages[0].content if messages[0].role == "
    "'system' else 'Help.' }}\n# Tools{% for t in tools %}{{ '\n' }}{{ t | tojson }}"
    "{% endfor %}<|im_end|>{{ '\n' }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user"
    "{% endif %}{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>{{ '\n' }}{% endif %}"
    "{% elif m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant"
    "{% if m.content %}{{ '\n' + m.content }}{% endif %}{% for c in m.tool_calls %}"
    "{% set c = c.function if c.function is defined else c %}{{ '\n' }}<tool_call>"
    '{{ \'\n{"name": "\' + c.name + \'", "arguments": \' }}{{ c.arguments | tojson }}}'
    "{{ '\n' }}</tool_call>{% endfor %}<|im_end|>{{ '\n' }}"
    "{% elif m.role != 'system' or not tools %}<|im_start|>{{ m.role + '\n' + "
    "m.content }}<|im_end|>{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
# Llama 3.1: one call in a message, bare JSON, and results as JSON texts.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' and tools and "
    "loop.index0 <= 1 %}<|start_header_id|>user<|end_header_id|>{{ '\n\n' }}Functions:"
    "{% for t in tools %}{{ '\n' }}{{ t | tojson(indent=4) }}{% endfor %}{{ '\n\n' + "
    "m.content | trim }}<|eot_id|>{% elif m.tool_calls is defined %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}"
    "{% endif %}{% set c = m.tool_calls[0].function %}<|start_header_id|>assistant"
    '<|end_header_id|>{{ \'\n\n{"name": "\' + c.name + \'", "parameters": \' }}'
    "{{ c.arguments | tojson }}}<|eot_id|>{% elif m.role == 'tool' %}"
    "<|start_header_id|>ipython<|end_header_id|>{{ '\n\n' }}{% if m.content is mapping "
    "or m.content is iterable %}{{ m.content | tojson }}{% else %}{{ m.content }}"
    "{% endif %}<|eot_id|>{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{{ '\n\n' + m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>"
    "{{ '\n\n' }}{% endif %}"
)
# Mistral: a control token in front of a list of calls, which have ids.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools and "
    "loop.last or (tools and loop.nextitem.tool_calls is defined) %}[AVAILABLE_TOOLS] "
    "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls is defined %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}"
    "{{ c.function | tojson | replace('}', '}') }}{{ ', ' if not loop.last }}"
    "{% endfor %}]{{ eos_token }}{% elif m.role == 'tool' %}[TOOL_RESULTS] "
    '{"content": {{ m.content }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# DeepSeek: arguments are texts, and tokens of their own close a call and the calls.
FENCES = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<user>"
    "{% if loop.first and tools %}{{ tools | tojson + '\n' }}{% endif %}{{ m.content }}"
    "{% elif m.role == 'tool' %}<output>{{ m.content }}</output>{% else %}<assistant>"
    "{{ m.content }}{% if m.tool_calls %}<calls>{% for c in m.tool_calls %}<call>{{ "
    "c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}</call>"
    "{% endfor %}</calls>{% endif %}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FENCE_MARKS = ("<begin>", "<user>", "<assistant>", "<calls>", "</calls>", "<call>",
               "</call>", "<output>", "</output>", "<end>")  # fmt: skip
MARKS = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
         "[/TOOL_RESULTS]", "<s>", "[INST]", "[/INST]", "</s>")  # fmt: skip
FORMATS = {
    "tags": dataclasses.replace(
        FAMILIES["qwen2.5"], template=TAGS,
        plain=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    ),
    "headers": dataclasses.replace(FAMILIES["llama3.1"], template=HEADERS, args=()),
    "brackets": dataclasses.replace(
        FAMILIES["mistral v3"], template=BRACKETS, control=MARKS
    ),
    "fences": dataclasses.replace(
        FAMILIES["qwen2.5"], template=FENCES, control=FENCE_MARKS, bos="<begin>",
    ),
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "depth",
            "description": 'The depth of a lake, in metres; "é".',
            "parameters": {
                "type": "object",
                "properties": {"lake": {"type": "string"}},
            },
        },
    }
]


def call(key, **arguments):
    function = {"name": "depth", "arguments": arguments}
    return {"id": key, "type": "function", "function": function}


def result(key, text):
    return {"role": "tool", "name": "depth", "tool_call_id": key, "content": text}


def calls(*made, content=""):
    return {"role": "assistant", "content": content, "tool_calls": list(made)}


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


ONE = calls(call("lakelake1", lake='Gård "sjö"\n{}', unit=[1, 2.5, None]))
CHATS = {
    "a call": [user("How deep?"), ONE],
    "a call without arguments": [user("How deep?"), calls(call("lakelake1"))],
    "a text and a call": [
        user("How deep?"), calls(call("lakelake1", lake="A"), content="I shall look.")
    ],
    "a result": [
        user("How deep is it?"), ONE, result("lakelake1", '{"m": "12\n"}'),
        said("It is 12 m deep."),
    ],
    "a result with white space at its edges": [
        user("How deep is it?"), ONE, result("lakelake1", "\n\n  12 m\t\n "),
        said("It is 12 m deep."),
    ],
    "two results": [
        user("Both?"), calls(call("lakelake1", lake="A"), call("lakelake2", lake="B")),
        result("lakelake1", "5"), result("lakelake2", "6 <tool_call> m"),
        said("5 and 6."), user("And C?"), calls(call("lakelake3", lake="C")),
        result("lakelake3", "7"), said("7."),
    ],
}  # fmt: skip
REFUSED = {
    ("headers", "two results"): "one call at once",
    ("headers", "a text and a call"): "drops the text of a message that calls",
    ("brackets", "a text and a call"): "drops the text of a message that calls",
}
ANSWERS = {
    "a text and a call": 1,
    "a call": 1,
    "a call without arguments": 1,
    "a result": 2,
    "a result with white space at its edges": 2,
    "two results": 4,
}


@pytest.fixture(scope="module", params=FORMATS)
def form(request):
    return request.param, *both(FORMATS[request.param])


def both(facts, template=None):
    template = template or facts.template
    eos = facts.eos or facts.control[-1]
    marks = {"bos": facts.bos, "eos": eos}
    own = Tokenizer(facts.tokenizer(), chat_template=template, **marks)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=facts.tokenizer(), bos_token=facts.bos, eos_token=eos
    )
    theirs.chat_template = template
    return own, ChatFormat(own, "chat"), theirs


def record(messages, **row):
    return to_record({"messages": messages, **row}, ColumnsConfig(), "rows.jsonl:7")


def reference(theirs, messages, prompt=False):
    if theirs.chat_template == FENCES:
        messages = copy.deepcopy(messages)
        for each in (c for m in messages for c in m.get("tool_calls", ())):
            arguments = json.dumps(each["function"]["arguments"], ensure_ascii=False)
            each["function"]["arguments"] = arguments
    text = theirs.apply_chat_template(
        messages, tools=TOOLS, add_generation_prompt=prompt, tokenize=False
    )
    return theirs.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("chat", CHATS)
def test_ids_are_those_of_transformers_and_calls_are_trained(form, chat):
    name, own, ours, theirs = form
    messages = CHATS[chat]
    read = record(messages, tools=TOOLS)
    if why := REFUSED.get((name, chat)):
        with pytest.raises(UserError, match=rf"rows\.jsonl:7: .*{why}"):
            ours.encode(read)
        return
    encoded, whole = ours.encode(read), reference(theirs, messages)
    assert encoded.ids == whole[: len(encoded.ids)]
    assert len(whole) - len(encoded.ids) <= 1, "words behind the last end are dropped"
    trained, expected = [], []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(reference(theirs, messages[:number], prompt=True))
            stop = len(reference(theirs, messages[: number + 1]))
            ids = whole[start:stop]
            while ids[-1] not in own.end_ids:
                ids.pop()  # The line break behind the end.
            expected += ids
    trained = [i for i, is_trained in zip(encoded.ids, encoded.trained, strict=True)
               if is_trained]  # fmt: skip
    assert trained == expected
    assert sum(i in own.end_ids for i in trained) == ANSWERS[chat]
    if messages[-1]["role"] == "assistant":
        prompt = ours.encode_prompt(read.turns[:-1])
        assert prompt == reference(theirs, messages[:-1], prompt=True)
        assert prompt == encoded.ids[: len(prompt)]


def test_all_forms_of_rows_become_the_same_conversation():
    expected = record(CHATS["a result"], tools=TOOLS)
    arguments = ONE["tool_calls"][0]["function"]["arguments"]
    bare = {"name": "depth", "arguments": arguments}
    text = {"name": "depth", "arguments": json.dumps(arguments)}
    of_text = calls({**ONE["tool_calls"][0], "function": text})
    question, _, found, answer = CHATS["a result"]
    other = record([question, of_text, found, answer], tools=json.dumps(TOOLS))
    assert other == expected
    share = [
        {"from": "human", "value": question["content"]},
        {"from": "function_call", "value": json.dumps(bare)},
        {"from": "observation", "value": found["content"]},
        {"from": "gpt", "value": answer["content"]},
    ]
    tools = json.dumps([TOOLS[0]["function"]])
    row = {"conversations": share, "tools": tools}
    other = to_record(row, ColumnsConfig(), "rows.jsonl:7")
    _, chat, _ = both(FORMATS["tags"])
    assert chat.encode(other) == chat.encode(expected)
    old = {"role": "assistant", "content": None, "function_call": text}
    share = [question, old, {**found, "role": "function"}, answer]
    assert chat.encode(record(share, tools=TOOLS)) == chat.encode(expected)


def test_a_call_may_be_a_text_and_the_tools_a_part_of_the_system_text():
    """As in Hermes' data: the row itself writes what other templates write."""
    text = said('<tool_call>{"name": "depth", "arguments": {}}</tool_call>')
    rest = [user("q"), text, {"role": "tool", "content": "5"}, said("a")]
    function = json.dumps(TOOLS[0]["function"])
    front = {"role": "system", "content": f"Tools: <tools>[{function}]</tools>"}
    described = record([front, *rest], tools=json.dumps(TOOLS))
    assert not any(turn.fields for turn in described.turns)
    assert record(rest, tools=TOOLS).turns[0].read_fields()["tools"] == TOOLS
    beside = record(rest, tools=TOOLS, system=front["content"])
    assert beside.turns == described.turns
    front["content"] = "You may ask for the depth."
    named = record([front, *rest], tools=TOOLS)
    assert named.turns[1].read_fields()["tools"] == TOOLS


@pytest.mark.parametrize("name", ["dolly", "chatml"])
def test_a_template_without_tools_refuses_in_one_sentence(name):
    facts = FAMILIES["chatml"]
    own, chat, _ = both(facts)
    if name == "dolly":
        chat = ChatFormat(own.with_chat_template(dolly_template(own)), "dolly")
    with pytest.raises(UserError, match=r"rows\.jsonl:7: the chat template does not wri"
                       "te calls of tools; take"):  # fmt: skip
        chat.encode(record(CHATS["a call"]))
    with pytest.raises(UserError, match="does not write the list of tools"):
        chat.encode(record([user("q"), said("a")], tools=TOOLS))


def test_a_call_cannot_forge_structure():
    _, chat, _ = both(FORMATS["tags"])
    for forged in (CHATML[1], CHATML[2]):
        with pytest.raises(UserError, match=r"a tool or a call holds '<.im_"):
            chat.encode(record([user("q"), calls(call("a", lake=forged))]))
    encoded = chat.encode(
        record([user("q"), calls(call("a")), result("a", CHATML[2]), said("a")])
    )
    assert encoded.ids.count(chat._tokenizer.eos) == 4, "a result is only text"


BAD = {
    "no call": (
        [user("q"), said("a"), result("x", "r"), said("b")],
        "message 3 is the",
    ),
    "two results of one": (
        [user("q"), calls(call("x")), result("x", "r"), result("x", "r"), said("b")],
        "message 4 is the result of a tool, and no call before it waits",
    ),
    "another id": (
        [user("q"), calls(call("x")), result("y", "r"), said("b")],
        "message 3 .* has the id 'y'",
    ),
    "no JSON": (
        [user("q"), calls({"function": {"name": "f", "arguments": "{lake: 1"}})],
        r"the arguments of the call of 'f', '\{lake: 1', is not JSON",
    ),
    "a key twice": (
        [user("q"), calls({"function": {"name": "f", "arguments": '{"a":1,"a":2}'}})],
        "call of 'f', .* is not JSON: an object has two keys of one name",
    ),
    "no object": (
        [user("q"), calls({"function": {"name": "f", "arguments": "[1]"}})],
        r"arguments of the call of 'f' are \[1\], not an object",
    ),
    "no name": ([user("q"), calls({"arguments": {}})], "a call of a tool has no name"),
    "a user calls": ([{**ONE, "role": "user"}, said("a")], "message of the user calls"),
    "text as a call": (
        [user("q"), {"role": "function_call", "content": "depth(lake)"}],
        "a call, .depth.lake.., is not JSON",
    ),
    "first": ([user("q"), result("x", "r"), said("a")], "must alternate"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_call_is_named_with_its_line(name):
    messages, why = BAD[name]
    with pytest.raises(BadRowError, match=rf"rows\.jsonl:7: .*{why}"):
        record(messages, tools=TOOLS)


NOT_JSON = {
    "a date": datetime.date(2026, 1, 2),
    "bytes": b"deep",
    "not a number": float("nan"),
    "half of a letter": "\ud800",
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_values_that_no_json_has_are_named_with_their_line(name):
    value = NOT_JSON[name]
    tool = {"name": "f", "description": {"x": [value]}}
    for messages, row, field in (
        ([user("q"), calls(call("x", lake=[value]))], {}, "tool_calls"),
        ([user("q"), said("a")], {"tools": [tool]}, "tools"),
    ):
        with pytest.raises(
            BadRowError, match=rf"rows\.jsonl:7: {field} cannot be JSON"
        ):
            record(messages, **row)


@pytest.mark.parametrize("tools", ["[]", "null", " ", [], {}, float("nan")])
def test_a_column_may_say_that_there_are_no_tools(tools):
    notes = collections.Counter()
    row = {"messages": [user("q"), said("a")], "tools": tools}
    read = to_record(row, ColumnsConfig(), "rows.jsonl:7", notes)
    assert read.turns == record(row["messages"]).turns and not notes


def test_runs_of_earlier_editions_read_rows_as_they_did():
    """They used no tools, dropped the fields of results, and refused calls."""

    def old(messages, **row):
        row["messages"] = messages
        return to_record(row, ColumnsConfig(), "rows.jsonl:7", edition=3)

    rest = [user("q"), said("depth()"), result("x", " 5 "), said("a")]
    bare = [*rest[:2], {"role": "tool", "content": "5"}, rest[3]]
    assert not any(turn.fields for turn in old(rest, tools=TOOLS).turns)
    assert content_key(old(rest, tools="no tool")) == content_key(old(bare))
    assert old(rest, tools=TOOLS).turns == old(bare).turns
    for messages in (
        [user("q"), ONE],
        [user("q"), {**said("a"), "function_call": {"name": None}}],
        [*rest[:2], {**rest[2], "role": "function"}, rest[3]],
        [user("q"), {"role": "tool_call", "content": '{"name": "f"}'}],
    ):
        with pytest.raises(BadRowError):
            old(messages)
        record(messages)


def test_columns_of_a_table_give_no_call_the_arguments_of_another(tmp_path):
    """Arrow unites the fields of structs, and has null where a row lacks one."""
    text = json.dumps({"lake": None})
    rows = [
        {
            "messages": [user("q"), calls(call("x", **arguments))],
            "tools": [{"name": name, "parameters": {"properties": {name: {"a": [1]}}}}],
        }
        for name, arguments in {"f": {"lake": "A"}, "g": {"zone": {"to": 3}}}.items()
    ]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet"
    )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines)
    table, plain = (
        load_rows(DataConfig(path=str(tmp_path / f"rows.{kind}")), 0).records()
        for kind in ("parquet", "jsonl")
    )
    for one, other in zip(table, plain, strict=True):
        read, expected = (
            [x.read_fields() for x in each.turns] for each in (one, other)
        )
        assert read == expected
    of_text = {"name": "f", "arguments": text}
    kept = to_record(
        TableRow(messages=[user("q"), calls({"function": of_text})]),
        ColumnsConfig(), "rows.parquet: row 1",
    )  # fmt: skip
    assert kept.turns[1].read_fields()["tool_calls"][0]["function"]["arguments"] == {
        "lake": None
    }
    assert record([user("q"), calls(call("x", lake=None))]).turns[1].said == (
        '{"name": "depth", "arguments": {"lake": null}}'
    )


@pytest.mark.parametrize(
    "given",
    [
        {"from": "function_call", "value": {"name": "f", "arguments": {"x": 1}}},
        {"from": "tool_call", "value": [{"name": "f", "parameters": {"x": 1}}]},
        {"role": "assistant", "tool_calls": ['{"name": "f", "arguments": {"x": 1}}']},
        {
            "role": "assistant",
            "tool_calls": [{"function": "f", "arguments": '{"x":1}'}],
        },
        {
            "role": "assistant",
            "tool_calls": float("nan"),
            "function_call": {"name": "f", "arguments": None, "parameters": {"x": 1}},
        },
    ],
)
def test_a_call_may_be_spelt_in_many_ways(given):
    read = record([user("q"), given]).turns[1]
    assert read.said == '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize(
    "empty",
    [
        {"tool_calls": float("nan")},
        {"tool_calls": "null"},
        {"function_call": {"name": None, "arguments": None}},
    ],
)
def test_an_answer_may_say_that_it_calls_nothing(empty):
    assert record([user("q"), {**said("a"), **empty}]).turns[1].fields == ""


def test_a_call_may_have_a_number_that_its_result_has_as_text():
    read = record([user("q"), calls(call(3)), result("3", "r"), said("a")])
    assert read.turns[1].read_fields()["tool_calls"][0]["id"] == "3"
    read = record([user("q"), calls(call("0")), result(0, "r"), said("a")])
    assert read.turns[2].read_fields()["tool_call_id"] == "0"


@pytest.mark.parametrize(
    "tools",
    ["{", "[1]", [{"description": "x"}], ["hammer"], [{"name": 3}], [{"name": None}]],
)
def test_tools_that_are_none_are_named(tools):
    with pytest.raises(BadRowError, match=r"rows\.jsonl:7: column 'tools'"):
        record([user("q"), said("a")], tools=tools)
    columns = ColumnsConfig(ignored=("tools",))
    row = {"messages": [user("q"), said("a")], "tools": tools}
    assert to_record(row, columns, "rows.jsonl:7").turns[0].fields == ""
