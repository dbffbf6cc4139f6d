"""From a CSV file to a client of the served model: `studio_story` tells it."""

import json


def test_the_whole_story(story):
    assert story.faults == []
    moved = len(set(story.answers))
    assert moved == 2, "first one checkpoint answered, then the other"


def test_the_server_takes_little_while_a_run_trains(story):
    """CPU seconds of the studio's process, which other programs hardly change.

    The limits for users are 2 % of a core at two lines a second, and 150 MB. The tiny
    model writes tens of lines a second, and a page is opened meanwhile, hence 5 %.
    """
    assert story.share < 0.05 and story.megabytes < 150


def test_every_action_of_the_story_was_noted_with_its_outcome(story):
    lines = (story.folder / "runs" / ".studio" / "audit.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    begun = {x["id"]: x["action"] for x in found if "outcome" not in x}
    ended = {x["id"]: x["outcome"] for x in found if "outcome" in x}
    assert ended == dict.fromkeys(begun, "done")
    actions = [
        "upload", "check rows", "start", "stop", "start", "checkpoint", "sample",
        "stop", "promote", "serve",
        "make key", "ask", "promote", "stop server",
    ]  # fmt: skip
    assert [x for x in begun.values() if x in actions] == actions
