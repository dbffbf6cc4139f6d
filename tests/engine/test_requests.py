"""A request that no slot could answer is refused, and the message names its field."""

import dataclasses
import math

import pytest

from research.core.errors import UserError
from research.engine.adapter_names import AdapterNames
from research.engine.requests import (
    MOST_BIASES,
    MOST_STOP_IDS,
    ContextOverflowError,
    Request,
    Sampling,
    UnknownAdapterError,
    check_request,
)

GOOD = Request((1, 2, 3), Sampling(max_new_tokens=5), top_logprobs=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
        ("top_p", 0), ("top_p", 1.01), ("top_k", -1), ("min_p", 2), ("min_p", -1),
        ("repetition_penalty", 0), ("repetition_penalty", math.nan),
        ("frequency_penalty", 2.5), ("presence_penalty", -3),
        ("logit_bias", {3: 101}), ("logit_bias", {10: 1}), ("logit_bias", {-1: 1}),
        ("max_new_tokens", -1), ("min_new_tokens", 6), ("prompt", ()),
        ("prompt", (1, 10)), ("prompt", (-1,)), ("stop", ("a", "")),
        ("top_logprobs", 21), ("top_logprobs", -1), ("stop_ids", frozenset([10])),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(field, value):
    if field in {f.name for f in dataclasses.fields(Sampling)}:
        sampling = dataclasses.replace(GOOD.sampling, **{field: value})
        request = dataclasses.replace(GOOD, sampling=sampling)
    else:
        request = dataclasses.replace(GOOD, **{field: value})
    with pytest.raises(UserError, match=f"^{field}: "):
        check_request(request, vocabulary=10, length=8)


def test_what_fits_exactly_is_accepted_and_one_token_more_is_not():
    check_request(GOOD, vocabulary=10, length=8)
    with pytest.raises(ContextOverflowError, match=r"3 prompt tokens and 5 new .* 7:"):
        check_request(GOOD, vocabulary=10, length=7)


def test_a_program_has_room_for_so_many_ids_and_no_more():
    def check(stops, biases, bias=1.0):
        sampling = Sampling(logit_bias=dict.fromkeys(range(biases), bias))
        stop_ids = frozenset(range(stops))
        check_request(Request((1,), sampling, stop_ids), vocabulary=999, length=200)

    check(MOST_STOP_IDS, MOST_BIASES)
    check(0, 999, bias=0.0)
    with pytest.raises(UserError, match=r"^stop_ids: 33 ids; at most 32"):
        check(MOST_STOP_IDS + 1, 0)
    with pytest.raises(UserError, match=r"^logit_bias: 301 ids; at most 300"):
        check(0, MOST_BIASES + 1)


def test_scores_of_the_prompt_need_scores():
    with pytest.raises(UserError, match="echo"):
        check_request(Request((1,), echo=True), vocabulary=10, length=200)


@pytest.mark.parametrize("field", ["ignore_eos", "min_new_tokens"])
def test_a_required_form_decides_alone_where_the_answer_ends(field):
    request = Request((1,), constraint=object(), ignore_eos=field == "ignore_eos")
    if field == "min_new_tokens":
        request = dataclasses.replace(request, sampling=Sampling(min_new_tokens=1))
    with pytest.raises(UserError, match=field):
        check_request(request, vocabulary=10, length=200)


# -- names of adapters -----------------------------------------------------------------


def test_a_row_is_free_when_neither_a_name_nor_a_request_has_it():
    names = AdapterNames(rows=3)
    first, _ = names.place("one")
    names.name("a", first)
    used = names.use("a")
    names.unload("a")
    second, _ = names.place("two")
    names.name("b", second)
    assert {first.row, second.row} == {1, 2}
    with pytest.raises(UserError, match="all 2 rows"):
        names.place("three")  # A request still runs with the first.
    names.release(used)
    assert names.place("three")[0].row == first.row


def test_the_same_content_has_one_row_under_all_its_names():
    names = AdapterNames(rows=3)
    loaded, is_there = names.place("one")
    names.name("run", loaded)
    assert not is_there and names.place("one") == (loaded, True)
    names.name("prod", loaded)
    names.unload("run")
    assert names.identities() == {"prod": "one"}
    assert names.place("two")[0].row != loaded.row


def test_a_new_adapter_of_an_old_name_leaves_running_requests_alone():
    names = AdapterNames(rows=3)
    names.name("a", names.place("one")[0])
    running = names.use("a")
    names.name("a", names.place("two")[0])
    assert running.identity == "one" and names.use("a").identity == "two"
    assert names.use("a").row != running.row


def test_an_unknown_adapter_is_named_with_those_that_there_are():
    names = AdapterNames(rows=3)
    names.name("mine", names.place("one")[0])
    for call in (names.use, names.unload):
        with pytest.raises(UnknownAdapterError, match="'other'; loaded: mine"):
            call("other")
    assert names.use("").row == 0
    with pytest.raises(UnknownAdapterError, match="base"):
        names.unload("")
