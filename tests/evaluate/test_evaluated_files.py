"""A finished run on files of rows: the numbers are those of its own evaluations."""

import collections
import dataclasses
import functools
import json
import re
import types

import jax
import pytest
from doors import run_door
from helpers import close
from tiny_model import make_tiny_model

from research.config.command_line import parse_with_changes
from research.config.field_names import name_sources
from research.config.run_config import Config, DataConfig, TextConfig
from research.config.saved_config import to_json
from research.core.errors import UserError
from research.data.grouped_values import by_group
from research.data.instructions.instruction_dataset import load_dataset
from research.data.instructions.row_cache import place_of
from research.data.text.row_layout import is_held_out
from research.data.text.text_sources import open_sources
from research.evaluate import run_evaluation
from research.evaluate.__main__ import main
from research.evaluate.evaluate_flags import INSTEAD, OF_FILES, EvaluateFlags
from research.evaluate.measuring import evaluated_models, row_losses
from research.evaluate.measuring.evaluated_models import EvaluatedModel, ModelSet
from research.evaluate.measuring.evaluated_rows import RowsRead, choose_rows
from research.evaluate.run_evaluation import Evaluated
from research.formats.base_model import open_base
from research.report.evaluation_page import row_facts
from research.runs.reopen import find_run, fitting_mesh
from research.tasks import task_registry
from research.tasks.instruction_rows import held_out_rows, training_records
from research.tasks.task_registry import prompt_format, rows_of_files
from research.tokenize.conversation import Record, Turn


def evaluate(folder, run, *flags):
    """Standard output, and the file that was written."""
    flags = ("--metrics=none", *flags)
    done = run_door(main, folder, "evaluate", f"--run={run}", *flags)
    assert done.returncode == 0, done.stderr
    path = re.search(r"written to (\S+)", done.stdout)[1]
    return done.stdout, json.loads((folder / path / "evaluation.json").read_text())


def rows_held_out(found):
    """The held-out rows of an instruction run, as rows of a file."""
    chat = prompt_format(found.config, found.base)
    data = load_dataset(found.config.data, found.config.seed, chat, found.config.text)
    for record in data.held_out_records:
        _, request, answer = (None, None, *record.turns)[-3:]
        yield {
            "instruction": request.text,
            "context": record.context,
            "response": answer.text,
            "category": record.category,
        }


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.usefixtures("caches_of_the_commands")
def test_held_out_rows_as_a_file_give_the_losses_of_the_run(
    place, unbroken, tmp_path, monkeypatch
):
    passes, measure = [], row_losses.each_sum
    count = lambda *given: passes.append(given) or measure(*given)  # noqa: E731
    monkeypatch.setattr(row_losses, "each_sum", count)
    run = place.run_dir("unbroken")
    rows = [*rows_held_out(find_run(run))]
    bad = {"instruction": "Nothing to say?", "response": "", "category": "open_qa"}
    write_lines(tmp_path / "rows.jsonl", [*rows, bad, {"response": "a"}])
    flag = "--config.data.bad_lines=skip"
    said, found = evaluate(tmp_path, run, "--data=rows.jsonl", flag)
    assert found["config"] == {"data.bad_lines": "skip"}
    assert len(passes) == 1, "both models see each batch as it is built"
    counts = {"evaluated": len(rows) + 1, "without_reference": 1, "without_loss": 0}
    counts |= {"read": len(rows) + 2, "dropped": 1}
    assert counts.items() <= found["rows"].items()
    assert f"1 of {len(rows) + 1} rows" in said and "without a reference" in said
    first, *_, last = place.lines("unbroken", "eval")
    assert found["step"] == last["step"] and set(found["models"]) == {"base", "tuned"}
    for name, line in (("base", first), ("tuned", last)):
        model = found["models"][name]
        close(model["loss"], line["loss"], 1e-5)
        assert model["by_group"].keys() == by_group(line, "loss").keys()
        for group, own in model["by_group"].items():
            close(own["loss"], line[f"loss/{group}"], 1e-5)
            assert own["tokens"] == line[f"tokens/{group}"]
    [refused] = found["left_out"]
    assert refused.startswith(f"rows.jsonl:{len(rows) + 2}: ")
    assert refused in " ".join(said.split())
    assert f"1 of {len(rows) + 2} rows" in said and "dropped when they were" in said
    assert re.search(r"loss base .* ppl base .* change", said), said


def test_files_may_have_other_columns_than_those_of_the_run(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(to_json(Config()))
    flags = (
        "--config.data.columns.response=a", "--data=x", "--config.data.bad_lines=skip",
    )  # fmt: skip

    def parse(*flags):
        argv = ["evaluate", f"--run={run}", "--run=other", *flags]
        return parse_with_changes(argv, "", EvaluateFlags, OF_FILES, INSTEAD)

    found, changes = parse(*flags)
    assert (found.run, found.data) == ((str(run), "other"), "x")
    assert changes == {"data.columns.response": "a", "data.bad_lines": "skip"}
    assert parse("--data=x")[1] == {}
    for flag, said in (
        ("--config.lora.rank=3", r"--config.lora.rank cannot be set here"),
        ("--config.data.path=my test.csv", "use --data='my test.csv'"),
        ("--config.text.sources=('a=b.txt',)", "use --data=a=b.txt"),
        ("--config.data.columns.respnse=a", "columns.response"),
        ("--config.data.bad_lines=maybe", "it must be one of"),
    ):
        with pytest.raises(UserError, match=said):
            parse(flag)


def held_out_documents(source, text):
    """The documents that are evaluated, each whole."""
    size = 0
    pieces = source.read(source.files, collections.Counter())
    for piece in pieces:
        assert piece.starts and piece.ends
        if is_held_out(piece, text.held_out_share) and size < text.held_out_bytes:
            size += len(piece.text.encode())
            yield piece.text


@pytest.mark.usefixtures("caches_of_the_commands")
def test_rows_that_a_run_has_trained_are_counted_and_named(place, unbroken, tmp_path):
    run = place.run_dir("unbroken")
    found = find_run(run)
    trained = next(training_records(found.config, found.base))
    shouted, context = trained.turns[0].text.upper() + "!", trained.context
    rows = [{"instruction": shouted, "context": context, "response": "yes"}]
    rows += [{"instruction": "Who sells blue zebras?", "response": "no"}]
    write_lines(tmp_path / "rows.jsonl", rows)
    said, values = evaluate(tmp_path, run, "--data=rows.jsonl")
    seen = values["overlap"]["tuned"]
    assert (seen["exact"], seen["words"], seen["problem"]) == (1, 0, "")
    assert seen["rows"][0]["training_place"] == f"unbroken: {trained.where}"
    assert "tuned has seen 1 of 2 rows in training" in said.replace("\n", " ")
    held = {
        record.where for record in held_out_rows(found.config, found.base).records()
    }
    places = [x.where for x in training_records(found.config, found.base)]
    assert len(places) == seen["training_rows"] and not held & {*places}


@pytest.mark.usefixtures("caches_of_the_commands")
def test_held_out_text_as_files_gives_the_bits_of_the_run(place, pretrained, tmp_path):
    assert pretrained.code == 0, pretrained.err
    run = place.run_dir("pretrained")
    config = find_run(run).config
    texts = {
        source.name: [*held_out_documents(source, config.text)]
        for source in open_sources(config.text, config.data)
    }
    for name, own in texts.items():
        write_lines(tmp_path / f"{name}.jsonl", [{"text": text} for text in own])
    first, *_, newest = place.saved_steps("pretrained")
    names = ("--data=code.jsonl,words=words.jsonl", f"--against={run}@{first}")
    said, found = evaluate(tmp_path, f"{run}@{newest}", *names)
    *_, last = place.lines("pretrained", "eval")
    [(name, by_metric)] = found["comparisons"].items()
    own, loss = found["models"][name], by_metric["loss"]
    assert found["config"] == {} and "raw text" in found["overlap"][name]["problem"]
    close(own["loss"], last["loss"], 1e-5)
    close(own["bits_per_byte"], last["bits_per_byte"], 1e-5)
    path = tmp_path / re.search(r"written to (\S+)", said)[1] / "rows.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sum(x["bytes"] for x in lines) == sum(
        len(text.encode()) for own in texts.values() for text in own
    )
    assert {x["source"] for x in lines} == texts.keys()
    assert all(x["models"][name]["loss"] > 0 for x in lines)
    # Each document is compared with itself, and a copy is no other one.
    documents = [*texts["code"], *texts["words"]]
    assert found["documents"] == loss["rows"] == len(documents)
    assert loss["clusters"] == len({*documents})
    close(loss["candidate"], own["loss"], 1e-9)
    assert loss["low"] <= loss["difference"] <= loss["high"] < 0
    assert loss["by_category"].keys() == texts.keys()
    assert sum(x["tokens"] for x in own["by_length"].values()) == own["tokens"]
    assert f"on {len(documents)} documents: {loss['verdict']}" in " ".join(said.split())


def test_rows_that_cannot_be_evaluated_are_named_by_file_and_line(tmp_path):
    base = open_base(str(make_tiny_model(tmp_path / "model")))
    text = TextConfig(cache_dir=str(tmp_path / "cache"))
    data = DataConfig(path=str(tmp_path / "gone.jsonl"), held_out=7, max_rows=1)

    def read(rows, **changes):
        write_lines(tmp_path / "rows.jsonl", rows)
        own = dataclasses.replace(data, **changes)
        config = Config(data=own, text=text)
        return rows_of_files(config, base, str(tmp_path / "rows.jsonl"))

    good, long = ({"instruction": "q", "response": x} for x in ("a", "a" * 600))
    bad = {"response": "a"}
    with pytest.raises(UserError, match=r"rows.jsonl:2: .*--config.data.bad_lines"):
        read([good, bad])
    # All rows, whatever the run held out and how many it used.
    found = read([good, bad, good, long, good], bad_lines="skip")
    assert found.origin.endswith("rows.jsonl, 4 rows")
    reasons = dict(line.split(": ", 1) for line in found.left_out)
    assert reasons.keys() == {"rows.jsonl:2", "rows.jsonl:4"}
    counts = RowsRead(found)
    rows = choose_rows(counts.records(), found.groups)
    assert [x.place for x in rows] == [f"rows.jsonl:{n}" for n in (1, 3, 4, 5)]
    assert counts.values() == {"read": 5, "dropped": 1}
    assert counts.lines_on(rows) == found.left_out
    first = [x for x in found.left_out if x.startswith("rows.jsonl:2: ")]
    assert counts.lines_on(rows[:2]) == first, "the long row was not chosen"
    batch = found.packed.batch(found.packed.rows)
    assert batch.tokens.shape == (1, data.seq_len)
    assert batch.weights.sum() == 3 * 2, "an answer of one letter, and its end"
    assert not found.unused
    # The same rows as those that a run holds out.
    write_lines(tmp_path / "gone.jsonl", [good | {"context": "z"}] * 3 + [bad, good])
    whole = {"eval_path": str(tmp_path / "rows.jsonl"), "max_rows": 0}
    own = dataclasses.replace(data, bad_lines="skip", **whole)
    held = RowsRead(held_out_rows(Config(data=own, text=text), base))
    assert len([*held.records()]) == 3
    assert held.values() == {"read": 5, "dropped": 2}
    assert sorted(map(place_of, held.lines_on(()))) == ["rows.jsonl:2", "rows.jsonl:4"]
    # Without a file of their own, too long ones count as well if they are drawn.
    drawn = [[good, long][n % 2] | {"context": str(n)} for n in range(12)]
    write_lines(tmp_path / "gone.jsonl", drawn)
    own = dataclasses.replace(data, held_out=6, max_rows=0)
    held = RowsRead(held_out_rows(Config(data=own, text=text), base))
    usable = len([*held.records()])
    assert 0 < usable < 6 and held.values() == {"read": 6, "dropped": 6 - usable}
    assert len(held.lines_on(())) == 6 - usable
    # By the rule of training: material stops it, all else is named.
    topics = [good | {"topic": "ab"[n % 2]} for n in range(4)]
    [line] = read(topics).unused
    assert line.startswith("topic: filled in 100.0% of the rows, 1 letters in rows.js")
    assert "--config.data.columns.category=topic reports the loss of each" in line
    with pytest.raises(
        UserError, match=r"'passage' is filled .*columns.context=passage"
    ):
        read([good | {"passage": "It rains."}])
    with pytest.raises(UserError, match=r"every row of .*rows.jsonl is longer") as said:
        read([long])
    needed = re.search(
        r"longest has (\d+): set --config.data.seq_len=(\d+)", str(said.value)
    )
    assert 600 < int(needed[1]) <= int(needed[2]) < int(needed[1]) + 64
    with pytest.raises(UserError, match=r"response=x, or messages for chats$") as said:
        read([{"question": "q", "x": "a"}, good])
    assert "bad_lines" not in str(said.value)


@pytest.mark.parametrize("place", ["a b:7", "f: row 7", "f: item 7", "f: byte 7"])
def test_the_place_of_a_line_ends_before_its_reason(place):
    assert place_of(f"{place}: the column x:1: is 'a: b'") == place
    assert place_of("2 rows have no place: really") == "2 rows have no place: really"


def test_counts_say_how_many_rows_were_read_and_evaluated():
    counts = {"evaluated": 2, "read": 8, "dropped": 2, "not_asked": []}
    values = {"data": {"origin": "f, 6 rows"}, "rows": counts, "differences": []}
    values |= {"models": {"base": {}}}
    assert row_facts(values) == ["2 of 8 rows (25.0%) dropped when they were read"]
    losses = {"base": types.SimpleNamespace(loss=1.5)}
    said = run_evaluation.headline(Evaluated("", values, [], losses))
    assert said == "evaluation, 2 rows of f, 6 rows: loss base 1.5000"
    counts["evaluated"] = 6
    said = run_evaluation.headline(Evaluated("", values, [], losses))
    assert said.startswith("evaluation, f, 6 rows: ")


@pytest.mark.parametrize(
    ("runs", "against", "has_base", "names", "baseline"),
    [
        (["a", "b"], "a", True, "ab", "a"),
        (["a", "b"], "b", True, "ba", "b"),
        (["a", "b"], "", False, "ab", "a"),
        (["a", "b"], "c", True, "cab", "c"),
        (["a", "b"], "", True, ["base", *"ab"], "base"),
        (["a"], "b", True, "ba", "b"),
    ],
)
def test_the_rows_are_those_of_the_first_run(
    monkeypatch, runs, against, has_base, names, baseline
):
    def found(address, *_):
        base, data = types.SimpleNamespace(fingerprint="f"), DataConfig()
        config = types.SimpleNamespace(data=data)
        run = types.SimpleNamespace(folder=address.folder, base=base, config=config)
        return EvaluatedModel(address.name, run, 3, "f")

    change = functools.partial(monkeypatch.setattr, evaluated_models)
    address = lambda x: types.SimpleNamespace(folder=x, name=x, step="latest")  # noqa: E731
    change("run_addresses", lambda given, *_, **__: [*map(address, given)])
    change("_found", found)
    change("_require_different", lambda _: None)
    change("_no_base", lambda _: "" if has_base else "has none")
    models = evaluated_models.find_models(runs, against)
    assert models.target.run.folder == "a" and models.baseline == baseline
    assert models.target in models.models
    assert [x.name for x in models.models] == [*names]


def test_a_run_that_has_not_ended_is_said(monkeypatch):
    planned = types.SimpleNamespace(planned_steps=9)
    monkeypatch.setattr(evaluated_models, "History", lambda *_: planned)

    class Folder(types.SimpleNamespace):
        __str__ = lambda self: "runs/a"  # noqa: E731

    def model(step, is_complete=False):
        tokenizer = types.SimpleNamespace(fingerprint="t")
        base = types.SimpleNamespace(tokenizer=tokenizer, fingerprint="f")
        folder = Folder(history="", is_complete=is_complete)
        run = types.SimpleNamespace(config=Config(), base=base, folder=folder)
        return EvaluatedModel(f"{step}", run, step, "f")

    said = "runs/a is not finished: step 4 of 9 is evaluated"
    assert model(4).unfinished == said
    assert not any(x.unfinished for x in (model(9), model(None), model(4, True)))
    found = ModelSet((model(None), model(4)), model(4), "None")
    assert run_evaluation.find_differences(found) == [said]


def test_a_task_without_rows_of_files_says_so(monkeypatch):
    kind = types.SimpleNamespace(rows_of_files=None)
    monkeypatch.setattr(task_registry, "find_kind", lambda config: kind)
    with pytest.raises(UserError, match="'instructions' cannot be evaluated on files"):
        rows_of_files(Config(), None, "rows.jsonl")


def test_whole_rows_are_split_over_devices_and_not_each_matrix(model):
    """Decoding does the other: it reads every matrix for one token."""
    devices = jax.devices()
    rows = fitting_mesh(model.specs, devices, decodes=False).shape
    tokens = fitting_mesh(model.specs, devices).shape
    assert rows["tensor"] == 1 and rows["fsdp"] > 1
    assert tokens["tensor"] > 1


def test_places_of_text_get_names(tmp_path):
    (tmp_path / "a,b=c.txt").write_text("x")
    named = ("x=a.txt", "b-1=dir/b-1.jsonl.gz")
    assert name_sources("x=a.txt, dir/b-1.jsonl.gz") == named
    assert name_sources(str(tmp_path / "a,b=c.txt")) == (f"a_b_c={tmp_path}/a,b=c.txt",)
    assert name_sources("hub://owner/name") == ("name=hub://owner/name",)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "--run is missing"),
        (("--run=x", "--data=rows.jsonl"), "x is no run directory"),
        (("--run=x", "--metrics=none,bleu"), "--metrics=none makes no answers"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(tmp_path, flags, said):
    done = run_door(main, tmp_path, "evaluate", *flags)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_more_rows_than_there_are_is_said(caplog):
    turns = (Turn("user", "q"), Turn("assistant", "a"))
    records = [Record(turns, "", "", f"rows.jsonl:{i}") for i in (1, 2)]
    assert len(choose_rows(records, [""], 2)) == 2 and not caplog.messages
    assert len(choose_rows(records, [""], 9)) == 2
    assert caplog.messages == ["--rows=9, and there are 2: all are evaluated"]
