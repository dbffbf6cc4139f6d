"""Other data under an existing run is refused, or accepted and recorded."""

import json
import re

import pytest
from commands import chain

pytestmark = pytest.mark.soak

FLAGS = (
    "--config=config.py",
    "--config.run_dir=runs/accept",
    "--config.data.path=changing.jsonl",
    "--config.data.held_out=6",
    "--config.eval.prompts=1",
    "--config.checkpoint.every=2",
)


def write_rows(place, word):
    with (place.folder / "changing.jsonl").open("w") as out:
        for n in range(60):
            row = {"instruction": f"Count to {n}.", "response": f"{n} {word}. " * 6}
            # As many categories as the sample has: the program is compiled already.
            print(json.dumps(row | {"category": "abcdefgh"[n % 8]}), file=out)


@chain
def accepted(place, results):
    """Stopped by SIGTERM, then other rows: refused, accepted, done; and further."""
    results("unbroken")
    write_rows(place, "words")
    first = place.stop_at(FLAGS, r"step +6/", 15)
    write_rows(place, "other words")
    refused = place.run("train", *FLAGS)
    allowed = place.run("train", *FLAGS, "--config.accept=('data',)")
    shorter = "--config.steps=4", "--config.accept=('steps',)"
    fewer = place.run("train", *FLAGS, *shorter)
    longer = "--config.steps=18", "--config.accept=('steps',)"
    return first, refused, allowed, fewer, place.run("train", *FLAGS, *longer)


@pytest.fixture
def history(place, accepted):
    return json.loads((place.run_dir("accept") / "run.json").read_text())


def test_other_data_is_refused_by_name(accepted):
    first, refused = accepted[:2]
    assert first.code == 75, first.err
    assert refused.code == 2
    assert re.search(r"\n  data: \w+ -> \w+\n", refused.err)
    assert "--config.accept" in refused.err


def test_an_override_goes_on_and_is_recorded(place, accepted, history):
    allowed, _, longer = accepted[2:]
    assert allowed.code == 0, allowed.err
    assert re.search(r"step \d+ restored", allowed.err)
    # It was said once; the run is now one of the other data.
    assert longer.code == 0, longer.err
    assert history["accepted"].keys() == {"data", "steps"}
    old, new = history["accepted"]["data"].split(" -> ")
    identity = json.loads((place.run_dir("accept") / "identity.json").read_text())
    assert identity["data"] == new != old
    assert any("accepted: data" in event["what"] for event in history["events"])


def test_the_report_is_of_the_data_at_hand(place, accepted, history):
    """Its losses before are those of the new rows at the step where they came in."""
    run = place.run_dir("accept")
    came, marks = history["starts"][2]["first"], {}
    for line in place.lines("accept", "eval"):
        marks.setdefault(line["data"], []).append((line["step"], line["loss"]))
    old, new = marks.values()
    assert old[0][0] == 0 and new[0][0] == came and new[-1][0] == 18
    report = (run / "report.md").read_text()
    assert f"loss step {came}" in report
    assert f"| {new[0][1]:.3f} | {new[-1][1]:.3f} |" in report
    assert f"accepted after step {came}: data: " in report
    assert "accepted after step 16: steps: 16" in report
    assert "learning rate of update 17" in report


def test_what_was_refused_is_kept_as_a_start_without_a_step(accepted, history):
    ends = [(start["cause"], start["exit_code"]) for start in history["starts"]]
    assert [code for _, code in ends] == [75, 2, 0, 0]
    assert ends[2][0] == ends[3][0] == "done"
    refused = history["starts"][1]
    assert refused["cause"].startswith("UserError: ")
    assert refused["first"] is refused["step"] is None
    assert "train" in " ".join(refused["provenance"]["command"])


def test_fewer_steps_than_were_made_are_refused_and_change_nothing(accepted, history):
    fewer = accepted[3]
    assert fewer.code == 2 and "to at least 16" in fewer.err, fewer.err
    assert history["accepted"]["steps"] == "16 -> 18", "refused, and written down"


def test_a_complete_run_goes_on_to_more_steps(place, accepted):
    longer = accepted[4]
    assert longer.code == 0, longer.err
    assert "step 16 restored" in longer.err
    lines = place.lines("accept", "train")
    assert [line["step"] for line in lines] == list(range(1, 19))
    again = place.run("train", *FLAGS, "--config.steps=18")
    assert again.code == 0 and "is complete" in again.err, again.err
