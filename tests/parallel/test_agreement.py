"""Processes agree by one small all-reduce; what differs or fails is named to all."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from waiting import PATIENCE

from research.core.errors import DamagedError, LonelyError, UserError
from research.parallel import agreement


class Meeting:
    """So many processes, as threads, and the all-reduce among them."""

    def __init__(self, count):
        self.count, self.sizes, self._handed_in = count, [], {}
        self._barrier = threading.Barrier(count)

    def group(self, index):
        def maximum(values):
            self._handed_in[index] = values
            self._barrier.wait(PATIENCE)
            found = np.max([*self._handed_in.values()], axis=0)
            if self._barrier.wait(PATIENCE) == 0:
                self.sizes.append(values.size)
            return found

        return agreement._Group(index, self.count, maximum)

    def each(self, call):
        """The results of `call(group, index)` in all processes, or their errors."""

        def one(index):
            try:
                return call(self.group(index), index)
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


def compare(meeting, facts):
    return meeting.each(lambda group, i: group.together(lambda: i, lambda _: facts(i)))


def test_equal_facts_cost_one_reduction_of_one_size():
    sizes = []
    for count in (2, 16):
        meeting = Meeting(count)
        facts = {f"knob {i}": "x" * 100 for i in range(100)}
        assert compare(meeting, lambda _, facts=facts: facts) == list(range(count))
        sizes.append(meeting.sizes)
    assert sizes[0] == sizes[1] and len(sizes[0]) == 1
    assert sizes[0][0] < 20, "the details travelled"


def test_all_processes_name_what_differs_in_one():
    def facts(index):
        odd = {"config.seed": "5", "data": "é\ud800"} if index in (3, 4) else {}
        return {"config.seed": "0", "config.steps": "40", "data": "d"} | odd

    said = compare(Meeting(5), facts)
    assert {type(error) for error in said} == {UserError}
    (text,) = {str(error) for error in said}
    assert text.startswith("processes 0 and 3 of this run differ:")
    assert "  config.seed: 0 and 5\n" in text and "  data: d and é" in text
    assert "config.steps" not in text


def test_what_only_one_process_has_is_named():
    said = compare(Meeting(2), lambda index: {"run 2": "new"} if index else {})
    assert all("  run 2: None and new\n" in str(error) for error in said)


@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        (UserError("no such file"), UserError, 2),
        (DamagedError("no such file"), UserError, 5),
        (KeyError("no such file"), LonelyError, 6),
    ],
)
def test_the_failure_of_one_process_is_raised_in_all(failure, kind, code):
    def work(index):
        if index == 2:
            raise failure

    said = Meeting(4).each(
        lambda group, i: group.together(lambda: work(i), lambda _: {"data": str(i)})
    )
    assert said[2] is failure
    for other in (said[0], said[1], said[3]):
        assert type(other) is kind and other.exit_code == code
        assert str(other).startswith("process 2: ") and "no such file" in str(other)


def test_one_process_says_something_to_all():
    """Each size is a program: a long text has no size of its own."""
    meeting = Meeting(3)
    for count in (0, 1, 100, agreement.PIECE // 4, agreement.PIECE):
        said = meeting.each(
            lambda group, i, count=count: group.said_by(1, f"by {i}" * count)
        )
        assert said == ["by 1" * count] * 3
    assert set(meeting.sizes) == {1, agreement.PIECE}


def test_the_devices_find_the_maximum():
    assert agreement._maximum(np.array([-7, 2**31 - 1], np.int32)).tolist() == [
        -7,
        2**31 - 1,
    ]


def test_a_process_alone_agrees_with_itself():
    assert agreement.together(lambda: 7, lambda _: 1 / 0) == 7
    assert agreement.of_first("é") == "é"
    assert agreement.everywhere(True) and not agreement.everywhere(False)
