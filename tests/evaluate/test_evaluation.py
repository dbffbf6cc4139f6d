"""A whole evaluation: models answer, are compared, and a kill costs little."""

import dataclasses
import json
import re
import shutil
import signal

import numpy as np
import pytest
from doors import run_door

from research.core.errors import UserError
from research.engine.slot_decoder import SlotDecoder
from research.evaluate import run_evaluation
from research.evaluate.__main__ import main
from research.evaluate.measuring import ask_models, prompt_keys
from research.evaluate.measuring.evaluated_models import find_models
from research.evaluate.scored_continuations import score_continuations
from research.report import evaluation_page
from research.runs.reopen import reopen
from research.studio.evaluations.evaluation_files import read_results
from research.tasks.task_registry import held_out_rows
from research.tokenize.conversation import Turn

FEW = ("--rows=2", "--max_new_tokens=4", "--slots=2")


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


def values_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


def contents(folder, run):
    """The files of an evaluation, in which the run has no name of its own."""
    return {x.name: x.read_bytes().replace(run, b"RUN") for x in folder.iterdir()}


@pytest.mark.usefixtures("caches_of_the_commands")
def test_models_answer_once_and_their_answers_are_judged(place, copies, monkeypatch):
    run, asked, ask = copies("judged"), [], ask_models.ask

    def counted(engine, requests, read):
        asked.append(len(requests))
        # The pass that gave the losses has read all prompts.
        assert read.keys() == requests.keys()
        return ask(engine, requests, read)

    monkeypatch.setattr(ask_models, "ask", counted)
    extend = SlotDecoder.extend
    monkeypatch.setattr(SlotDecoder, "extend", None)
    first = results(place, evaluate(place, f"--run={run}", *FEW, "--metrics=chrf"))
    lines = [json.loads(x) for x in (first / "rows.jsonl").read_text().splitlines()]
    assert [x["models"].keys() for x in lines] == [{"base", "tuned"}] * 2
    for each in (x["models"][name] for x in lines for name in x["models"]):
        assert 0 < each["new_tokens"] + each["stopped"] <= 4
        assert each["scores"].keys() == {"chrf"}
    history = (run / "run.json").read_text()
    assert f'"evaluation": "{first.name}"' in history

    # The studio shows the same from the files alone.
    shown = read_results(first, first / "rows.jsonl")
    losses = evaluation_page.loss_lines(shown.values)
    pages = evaluation_page.format_pages(shown.values, lines, losses)
    for page, text in pages.items():
        assert text == (first / page).read_text()
    assert shown.verdicts and shown.answers and len(shown.losses) > 1

    # Both ways to read a prompt give the same answers, here in float32.
    with monkeypatch.context() as patch:
        for kept in run.glob("evaluations/kept/answers-*"):
            kept.unlink()
        patch.setattr(prompt_keys, "SHARE", 0.0)
        patch.setattr(ask_models, "ask", ask)
        patch.setattr(SlotDecoder, "extend", extend)
        rows = (first / "rows.jsonl").read_bytes()
        assert any(x["models"]["tuned"]["answer"] for x in lines)
        done = evaluate(place, f"--run={run}", *FEW, "--metrics=chrf")
        assert results(place, done) == first and "losses of" not in done.stderr
        assert (first / "rows.jsonl").read_bytes() == rows

    # Other metrics need no new answers.
    other = results(place, evaluate(place, f"--run={run}", *FEW, "--metrics=empty"))
    assert asked == [2 * 2] and other.name != first.name

    def changed(config, base):
        return dataclasses.replace(held_out_rows(config, base), sha256="f" * 64)

    # Losses alone are compared, too; here of data that has changed.
    monkeypatch.setattr(run_evaluation, "held_out_rows", changed)
    done = evaluate(place, f"--run={run}", *FEW, "--metrics=none")
    values = values_of(results(place, done))
    assert len(asked) == 1
    [loss] = values["comparisons"]["tuned"].values()
    models = values["models"]
    assert loss["baseline"] == pytest.approx(models["base"]["loss"])
    assert loss["candidate"] == pytest.approx(models["tuned"]["loss"])
    assert loss["verdict"] and loss["rows"] == 2 == models["base"]["rows_with_loss"]
    assert models["base"]["bits_per_byte"] > 0 and not values["differences"]
    said = values["data"]["problem"]
    assert not values_of(first)["data"]["problem"]
    assert "has changed since its training" in said and "now ffffffffffff" in said
    assert "judged has changed since" in " ".join(done.stdout.split())


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


# Its answers come so slowly that a signal can meet each.
SLOW_ANSWERS = """
import time
from research.evaluate.measuring.kept_lines import KeptLines
add = KeptLines.add
def add_late(self, *given):
    add(self, *given)
    time.sleep(0.2)
KeptLines.add = add_late
"""


@pytest.mark.soak
def test_a_command_that_is_killed_again_and_again_gives_the_same_bytes(place, copies):
    flags = ("--rows=5", "--max_new_tokens=6", "--metrics=chrf,stopped")
    whole, run = copies("whole"), copies("killed")
    [whole_done, killed] = ((f"--run=runs/{x.name}", *flags) for x in (whole, run))
    expected = place.run("evaluate", *whole_done)
    assert expected.code == 0, expected.err
    for kind, count in (("losses", 4), ("answers", 3), ("answers", 7)):
        process = place.start("evaluate", *killed, program=SLOW_ANSWERS)
        while count > sum(
            x.read_bytes().count(b"\n") for x in run.glob(f"evaluations/kept/{kind}-*")
        ):
            assert not process.wait(0.01), process.finish().err
        process.send(signal.SIGKILL)
        assert process.finish().code == -signal.SIGKILL
    done = place.run("evaluate", *killed)
    assert done.code == 0, done.err
    [wanted] = (x for x in (whole / "evaluations").iterdir() if x.name != "kept")
    [found] = (x for x in (run / "evaluations").iterdir() if x.name != "kept")
    assert found.name == wanted.name
    assert contents(found, b"killed") == contents(wanted, b"whole")


@pytest.mark.soak
@pytest.mark.usefixtures("caches_of_the_commands")
def test_runs_of_one_base_answer_together_as_each_alone(place, copies):
    # So small models have the same likeliest tokens at many steps; draws differ.
    flags = ("--rows=5", "--max_new_tokens=8", "--metrics=chrf", "--temperature=1")
    first, *_ = place.saved_steps("unbroken")
    runs = [f"{copies('early')}@{first}", str(copies("late"))]

    def answers(*named):
        folder = results(place, evaluate(place, *(f"--run={x}" for x in named), *flags))
        lines = (folder / "rows.jsonl").read_text().splitlines()
        every = [json.loads(line)["models"] for line in lines]
        return {x: [each[x]["answer"] for each in every] for x in every[0]}

    together = answers(*runs)
    base, *tuned = together.values()
    assert len(tuned) == 2 and tuned[0] != tuned[1] and base not in tuned
    for run, own in zip(runs, tuned, strict=True):
        assert answers(run) == {"base": base, "tuned": own}


@pytest.mark.soak
@pytest.mark.usefixtures("caches_of_the_commands")
def test_prompts_alone_are_answered_and_judged_without_references(place, copies):
    run = copies("prompted")
    rows = [{"instruction": f"Say {i}."} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place.folder / "prompts.jsonl").write_text(lines)
    flags = (f"--run={run}", "--data=prompts.jsonl", "--max_new_tokens=4")
    done = evaluate(place, *flags)
    values = values_of(results(place, done))
    assert values["rows"]["without_reference"] == 3
    assert "stopped" in values["metrics"] and "rouge_l" not in values["metrics"]
    assert values["comparisons"]["tuned"]["stopped"]["rows"] == 3
    assert "loss" not in values["models"]["tuned"] and "losses" not in done.stdout
    for metrics in ("none", "chrf"):
        refused = evaluate(place, *flags, f"--metrics={metrics}")
        assert refused.returncode == 2 and "response" in refused.stderr


@pytest.mark.soak
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
    for row in scored:
        assert row["choices"] == texts
        for own in row["models"].values():
            assert own.keys() == {"loss", "log_probabilities", "chosen", "scores"}
            right = row["right"] == own["chosen"]["choice_none"]
            assert own["scores"]["choice_none"] == right
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
