"""A whole evaluation: models answer, are compared, and a kill costs little."""

import json
import re
import shutil

import numpy as np
import pytest
from doors import run_door

from research.core.errors import UserError
from research.evaluate.__main__ import main
from research.evaluate.measuring import ask_models
from research.evaluate.measuring.evaluated_models import find_models
from research.evaluate.scored_continuations import score_continuations
from research.runs.reopen import reopen
from research.tokenize.conversation import Turn

FEW = ("--rows=5", "--max_new_tokens=6", "--metrics=chrf,stopped")


@pytest.fixture
def copies(place, unbroken):
    """Copies of a finished run beside it, which are removed in the end."""
    assert unbroken.code == 0, unbroken.err
    made = []

    def copy(name):
        made.append(place.run_dir(name))
        return shutil.copytree(place.run_dir("unbroken"), made[-1])

    yield copy
    for each in made:
        shutil.rmtree(each)


def evaluate(place, *flags):
    return run_door(main, place.folder, "evaluate", *flags)


def results(place, done):
    assert done.returncode == 0, done.stderr
    return place.folder / re.search(r"written to (\S+)", done.stdout)[1]


def contents(folder, run):
    """The files of an evaluation, in which the run has no name of its own."""
    return {x.name: x.read_bytes().replace(run, b"RUN") for x in folder.iterdir()}


@pytest.mark.usefixtures("caches_of_the_commands")
def test_an_interrupted_evaluation_continues_and_gives_the_same_bytes(
    place, copies, monkeypatch
):
    whole = results(place, evaluate(place, f"--run={copies('whole')}", *FEW))
    asked, ask = [], ask_models.ask

    def interrupted(engine, requests):
        for count, found in enumerate(ask(engine, requests), start=1):
            yield found
            if count == 3:
                raise KeyboardInterrupt

    def counted(engine, requests):
        asked.append(len(requests))
        return ask(engine, requests)

    run = copies("interrupted")
    monkeypatch.setattr(ask_models, "ask", interrupted)
    assert evaluate(place, f"--run={run}", *FEW).returncode == 130
    [kept] = (run / "evaluations/kept").glob("answers-*")
    assert len(kept.read_text().splitlines()) == 3
    with kept.open("a") as file:
        file.write('{"model": "base", "row": "torn')
    monkeypatch.setattr(ask_models, "ask", counted)
    again = results(place, evaluate(place, f"--run={run}", *FEW))
    assert asked == [2 * 5 - 3], "what was answered before is not asked again"
    assert again.name == whole.name
    assert contents(again, b"interrupted") == contents(whole, b"whole")

    # Other metrics need no new answers; other answers never mix with these.
    other = results(place, evaluate(place, f"--run={run}", *FEW[:2], "--metrics=empty"))
    assert len(asked) == 1 and other.name != whole.name
    results(place, evaluate(place, f"--run={run}", FEW[0], "--max_new_tokens=7"))
    assert asked == [7, 10]

    # Losses alone are compared, too.
    none = results(place, evaluate(place, f"--run={run}", FEW[0], "--metrics=none"))
    assert asked == [7, 10]
    values = json.loads((none / "evaluation.json").read_text())
    [loss] = values["comparisons"]["tuned"].values()
    models = values["models"]
    assert loss["baseline"] == pytest.approx(models["base"]["loss"])
    assert loss["candidate"] == pytest.approx(models["tuned"]["loss"])
    assert loss["verdict"] and loss["rows"] == 5 == models["base"]["rows_with_loss"]
    assert models["base"]["bits_per_byte"] > 0 and not values["differences"]

    kept.write_text("[1]\n")
    bad = evaluate(place, f"--run={run}", *FEW)
    assert bad.returncode == 2 and "kept/answers-" in bad.stderr
    assert len(bad.stderr.splitlines()) == 1


def test_no_checkpoint_is_compared_with_itself(place, unbroken, tmp_path):
    assert unbroken.code == 0, unbroken.err
    run = str(place.run_dir("unbroken"))
    newest = find_models([run]).target.step
    named = f"{run}@{newest}"
    refused = [
        ([run], run, "--run and --against both name"),
        ([named], run, f"are both step {newest} of"),
        ([run, named], "", f"are both step {newest} of"),
        ([run], str(tmp_path / "none"), f"--against={tmp_path / 'none'}: "),
    ]
    for runs, against, said in refused:
        with pytest.raises(UserError, match=re.escape(said)):
            find_models(runs, against)


@pytest.mark.usefixtures("caches_of_the_commands")
def test_choices_are_scored_after_the_prompt_by_every_model(place, copies):
    run = copies("quizzed")
    texts = ["a red bird", "no", "maybe so"]
    rows = [
        {"question": f"What flies {i} times?", "choices": texts, "answer": i}
        for i in range(3)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place.folder / "quiz.jsonl").write_text(lines)
    columns = [f"--config.data.columns.{k}" for k in ("instruction", "response")]
    done = evaluate(
        place, f"--run={run}", "--data=quiz.jsonl", "--metrics=choice_none",
        f"{columns[0]}=question", f"{columns[1]}=answer",
    )  # fmt: skip
    folder = results(place, done)
    [kept] = (run / "evaluations/kept").glob("choices-*")
    assert not [*(run / "evaluations/kept").glob("answers-*")], "nothing is written"
    found = {}
    for line in map(json.loads, kept.read_text().splitlines()):
        found[line["model"], line["row"]] = line["logprob"]
    scored = [json.loads(x) for x in (folder / "rows.jsonl").read_text().splitlines()]
    opened = reopen(run)
    for name, generator in opened.generators(compare=True).items():
        pairs = [
            (
                opened.prompts.encode_prompt([Turn("user", row["question"])]),
                opened.base.tokenizer.encode_texts([text])[0],
            )
            for row in scored
            for text in texts
        ]
        wanted = [x.logprob for x in score_continuations(generator, pairs)]
        own = [found[name, f"{row['row']} {i}"] for row in scored for i in range(3)]
        np.testing.assert_allclose(own, wanted, atol=1e-3)
        for row, values in zip(scored, np.reshape(own, (3, 3)), strict=True):
            is_right = float(np.argmax(values) == int(row["reference"]))
            assert row["models"][name]["scores"] == {"choice_none": is_right}

    rows[1]["answer"] = 7
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place.folder / "quiz.jsonl").write_text(lines)
    bad = evaluate(
        place, f"--run={run}", "--data=quiz.jsonl", "--metrics=choice_none",
        f"{columns[0]}=question", f"{columns[1]}=answer",
    )  # fmt: skip
    assert bad.returncode == 2 and "quiz.jsonl:2: the right choice is 7" in bad.stderr
