"""Fine-tuning through the real commands: `train`, `generate`; see `commands.py`."""

import collections
import csv
import dataclasses
import gzip
import io
import json
import re
import signal
import statistics
import textwrap

import jax
import numpy as np
import pytest
import tiny_model
from commands import (
    EVALUATIONS,
    FEW_ROWS,
    QUESTION,
    RANK,
    ROOT,
    STEPS,
    chain,
    snapshot,
    step_line,
)
from kills import torn
from rich.console import Console
from run_results import check_equal, final_state, history, tensorboard_events

from research.config.data_knobs import NEWEST_EDITION
from research.config.knobs import flat
from research.config.run_config import Config, DataConfig, ModelConfig, TextConfig
from research.data.grouped_values import by_group
from research.data.instructions.instruction_dataset import load_dataset
from research.data.instructions.row_selection import load_rows
from research.formats.base_model import open_base
from research.report import terminal
from research.report.run_results import read_results
from research.runs.display_files import read_findings, read_preview
from research.runs.run_directory import RunDir
from research.tokenize.chat_template import ChatFormat


@chain
def remeshed(place, results):
    """Begun on eight devices, ended on one."""
    sizes = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    return [
        place.stop("remeshed", step_line(8), signal.SIGTERM, *sizes, devices=8),
        place.train("remeshed"),
    ]


@chain
def hurried(place, results):
    return place.stop("hurried", "data:", signal.SIGINT)


KINDS = 8
ROWS = [
    {
        "question": f"What is {i} plus {i}?",
        "passage": f"Adding {i} doubles it." if i % 3 == 0 else "",
        "answer": f"It is {2 * i}, as «anyone» knows.",
        # As many kinds as the sample has: the program is compiled already.
        "kind": f"kind {i % KINDS}",
    }
    for i in range(40)
]
COLUMNS = {
    "instruction": "question",
    "context": "passage",
    "response": "answer",
    "category": "kind",
}


@chain
def own_csv(place, results):
    results("unbroken")
    with (place.folder / "own.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    mapped = [f"--config.data.columns.{k}={v}" for k, v in COLUMNS.items()]
    newest = "--config.data.edition=0"
    return place.train("csv", "--config.data.path=own.csv", newest, *mapped, *FEW_ROWS)


@chain
def own_chats(place, results):
    """Chat rows, and full fine-tuning in bfloat16."""
    with gzip.open(place.folder / "own.jsonl.gz", "wt") as file:
        for row in ROWS:
            turns = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello."},
                {"role": "assistant", "content": "Ask."},
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
            print(json.dumps({"messages": turns}), file=file)
    full = (
        "--config.trainable=full",
        "--config.lora.rank=16",
        "--config.lora.dropout=0.0",
        "--config.model.dtype=bfloat16",
        "--config.steps=-1",
        "--config.epochs=0.75",
        "--config.eval.every=0",
    )
    path = "--config.data.path=own.jsonl.gz"
    # Two steps alone: compiling takes longer than they do.
    trained = place.train("chats", path, *full, *FEW_ROWS, quick=True)
    return trained, place.generate("chats", f"--prompt={QUESTION}", "--compare")


@chain
def long_prompts(place, results):
    """Contexts that training cuts to fit and that do not fit as prompts."""
    with (place.folder / "long.jsonl").open("w") as file:
        for i in range(16):
            row = {"instruction": f"What of {i}?", "context": "word " * 150}
            print(json.dumps(row | {"response": f"Much of {i}."}), file=file)
    truncate = "--config.data.overlength=truncate"
    path = "--config.data.path=long.jsonl"
    return place.train("long-prompts", path, truncate, *FEW_ROWS)


@chain
def again(place, results):
    results("unbroken")
    before = snapshot(place.run_dir("unbroken"))
    finished = place.train("unbroken")
    return finished, before, snapshot(place.run_dir("unbroken"))


@chain
def talks(place, results):
    results("unbroken")
    chat = f"{QUESTION}\n\n{QUESTION}\nWhy?\n"
    best = "--step=best"
    return {
        "chat": place.generate("unbroken", best, "--chat", stdin=chat),
        "compare": place.generate(
            "unbroken", best, f"--prompt={QUESTION}", "--compare"
        ),
    }


# -- a training run ------------------------------------------------------------------


def test_training_succeeds_and_warns_of_nothing(unbroken):
    assert unbroken.code == 0, unbroken.err
    assert not re.search("warning|traceback", unbroken.err + unbroken.out, re.I)


def test_doctor_tells_the_facts_of_the_run(place, unbroken):
    told = " ".join(re.sub("[│|]", " ", unbroken.out).split())
    identity = json.loads((place.run_dir("unbroken") / "identity.json").read_text())
    assert f"base model model, sha256 {identity['base model'][:12]}" in told
    assert f"sha256 {identity['tokenizer'][:12]}" in told
    assert f"sha256 {identity['data'][:12]}" in told
    for file in (ROOT / "research/data/instructions/sample").iterdir():
        assert f"{file.stem} {len(file.read_text('utf-8').splitlines())}" in told
    weights = tiny_model.random_weights(seed=0)
    adapted = [tensor for name, tensor in weights.items() if "proj" in name]
    assert f"{len(adapted)} matrices under 7 paths" in told
    for path in ("attention.query", "attention.output", "mlp.down"):
        assert re.search(rf"layers\.{path}\.kernel \([\d, ]+\) rank {RANK}", told)
    trained = sum(RANK * sum(tensor.shape) for tensor in adapted)
    frozen = sum(tensor.size for tensor in weights.values())
    assert f"{trained:,} trained" in told
    assert f"{frozen:,} frozen" in told
    assert "mesh replica=1, data=1, fsdp=1, expert=1, tensor=1, context=1 on" in told
    part, whole, share = re.search(
        r"trained tokens ([\d,]+) of ([\d,]+) \(([\d.]+)%\)", told
    ).groups()
    part, whole = (int(x.replace(",", "")) for x in (part, whole))
    assert 0 < part < whole
    assert f"{100 * part / whole:.1f}" == share


def test_first_row_marks_the_answer_and_its_end_and_nothing_else(unbroken):
    shown = " ".join(unbroken.out.split())
    rows = [
        json.loads(line)
        for file in (ROOT / "research/data/instructions/sample").iterdir()
        for line in file.read_text("utf-8").splitlines()
    ]
    expected = [
        f"marked: <|im_start|>user {row['instruction']} {row['context']}<|im_end|> "
        f"<|im_start|>assistant [[{row['response']}<|im_end|>]]"
        for row in rows
    ]
    squeezed = [" ".join(x.replace(" <|im_end", "<|im_end").split()) for x in expected]
    assert any(x in shown for x in squeezed), unbroken.out


def test_the_run_directory_holds_what_the_terminal_showed(place, unbroken):
    """Rendered from `doctor.json`, `preview.json` and `answers.json` alone."""
    folder = place.run_dir("unbroken")
    shown = io.StringIO()
    console = Console(file=shown, width=160)
    findings = read_findings(folder)
    terminal.show_findings(console, findings)
    terminal.show_preview(console, read_preview(folder))
    assert unbroken.out.startswith(shown.getvalue())
    results = read_results(folder, {}, [])
    assert len(results.answers) == Config().eval.prompts
    terminal.show_results(console, results)
    assert unbroken.out.startswith(shown.getvalue())
    doctor = json.loads((folder / "doctor.json").read_text())
    assert doctor["ok"] and len(doctor["findings"]) == len(findings) > 8
    [counted] = [f.numbers for f in findings if f.name == "trained tokens"]
    assert 0 < counted["trained"] < counted["real"]


def test_the_preview_has_the_marks_of_the_batch_that_is_trained(place, unbroken):
    """Built again from the run's own config and data, and compared bit by bit."""
    config = dataclasses.replace(
        RunDir(place.run_dir("unbroken")).config(),
        model=ModelConfig(init_from=str(place.folder / "model")),
        text=TextConfig(cache_dir=str(place.folder / "tokens")),
    )
    base = open_base(str(place.folder / "model"))
    chat = ChatFormat(base.tokenizer, config.data.template, config.data.system)
    train = load_dataset(config.data, config.seed, chat, config.text).train
    preview = read_preview(place.run_dir("unbroken"))
    assert len(preview) == 4
    batch = train.batch(train.rows[:4])
    for i, row in enumerate(preview):
        ids, targets, trained = [], [], []
        for document in row.documents:
            spans = document.spans
            own = [token for span in spans for token in span.ids]
            marks = [span.trained for span in spans for _ in span.ids]
            assert not marks[0] and {x.trained for x in spans} == {False, True}
            assert document.where.endswith(tuple("0123456789"))
            assert f"{document.group}.jsonl:" in document.where
            ids, targets = ids + own[:-1], targets + own[1:]
            trained += marks[1:]
        real = len(ids)
        np.testing.assert_array_equal(batch.tokens[i, :real], ids)
        np.testing.assert_array_equal(batch.targets[i, :real], targets)
        np.testing.assert_array_equal(batch.weights[i, :real], trained)
        assert not batch.weights[i, real:].any() and not batch.segments[i, real:].any()


def test_a_plain_line_for_every_step(place, unbroken):
    form = re.compile(
        rf"step +(\d+)/{STEPS}  ETA \d+:\d\d  epoch (\S+)  loss (\S+)  "
        r"eval (\S+)  lr (\S+)  norm (\S+)  [\d,]+ tok/s  [\d,]+ trained/s  "
        r"\d+\.\d GB$",  # A CPU has no MFU.
        re.M,
    )
    train = place.lines("unbroken", "train")
    assert [found.group(1, 2, 3, 5, 6) for found in form.finditer(unbroken.err)] == [
        (
            str(line["step"]),
            f"{line['epoch']:.2f}",
            f"{line['loss']:.3f}",
            f"{line['learning_rate']:.1e}",
            f"{line['grad_norm']:.2f}",
        )
        for line in train
    ]
    assert all(x["tokens"] > x["trained_tokens"] > 0 for x in train)
    assert all(x["elapsed_s"] >= x["step_s"] > 0 for x in train)


def test_held_out_loss_falls(place, unbroken):
    before, *_, after = place.lines("unbroken", "eval")
    assert after["loss"] < 0.9 * before["loss"]
    tokens = by_group(after, "tokens")
    mean = sum(n * after[f"loss/{c}"] for c, n in tokens.items()) / sum(tokens.values())
    assert mean == pytest.approx(after["loss"], rel=1e-6)


def test_answers_of_training_are_those_of_the_report(place, unbroken):
    lines = place.lines("unbroken", "answers")
    assert [line["step"] for line in lines] == [0, 8, STEPS]
    assert {line["rows"] for line in lines} == {3}
    report = place.run_dir("unbroken") / "answers.json"
    measures = json.loads(report.read_text())["metrics"]
    assert {"rouge_l", "stopped", "repetition"} <= {x["name"] for x in measures}
    for measure in measures:
        ends = lines[0], lines[-1]
        assert [x.get(measure["name"]) for x in ends] == [
            measure["base"],
            measure["tuned"],
        ]
    assert "answers to held-out rows" in unbroken.out
    assert "| answers | unit |" in (report.parent / "report.md").read_text()


@pytest.mark.parametrize("run", ["unbroken", "broken"])
def test_metrics_have_every_step_exactly_once(place, unbroken, broken, run):
    assert [x["step"] for x in place.lines(run, "train")] == [*range(1, STEPS + 1)]
    assert [x["step"] for x in place.lines(run, "eval")] == EVALUATIONS


def test_no_step_counts_for_the_time_of_another(place, unbroken):
    """On a CPU a step is over when its call returns, and is logged before the next."""
    seconds = [line["step_s"] for line in place.lines("unbroken", "train")]
    assert min(seconds) > statistics.median(seconds) / 8


def test_metrics_are_flat_and_pandas_reads_them(place, unbroken):
    """As docs/run_directory.md says; a field has one type in all lines."""
    from matplotlib import pyplot

    path = place.run_dir("unbroken") / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    types = {(name, type(line[name])) for line in lines for name in line}
    assert len(types) == len({name for name, _ in types})
    assert {kind for _, kind in types} <= {int, float, str}
    docs = (ROOT / "docs" / "run_directory.md").read_text()
    shown, rest = docs.partition("    import pandas\n")[1:]
    names = {"run": path.parent}
    exec(textwrap.dedent(shown + rest.partition("\n\n")[0]), names)
    pyplot.close("all")
    metrics = names["metrics"]
    assert len(metrics) == len(lines) and str(metrics["time"].dt.tz) == "UTC"
    held = metrics[metrics["kind"] == "eval"].set_index("step")
    for line in place.lines("unbroken", "eval"):
        for name in ("loss", *(x for x in line if x.startswith("loss/"))):
            assert held.at[line["step"], name] == line[name]


def test_every_file_and_field_of_a_run_is_documented(place, unbroken):
    docs = (ROOT / "docs" / "run_directory.md").read_text()
    # In code: the names of files and fields, alone or in an example of JSON.
    code = re.findall(r"`([^`\n]+)`", docs)
    words = {x.partition("/")[0] for x in code}
    words |= {name for x in code for name in re.findall(r'"(\w+)"', x)}
    run = place.run_dir("unbroken")
    found = {file.name for file in run.iterdir()}
    for kind in ("train", "eval", "goodput"):
        found |= {
            x.partition("/")[0] for line in place.lines("unbroken", kind) for x in line
        }
    recorded = history(place, "unbroken")
    found |= {*recorded, *recorded["starts"][0], *recorded["starts"][0]["provenance"]}
    for name in ("doctor", "preview", "answers"):
        found |= keys_of(json.loads((run / f"{name}.json").read_text()))
    assert not found - words
    facts = docs.partition("## complete.json")[2].partition("##")[0]
    for name in json.loads((run / "complete.json").read_text()):
        assert name.removesuffix("'s sha256") in facts, name


def keys_of(value):
    """The names of all fields, at every depth, but for the figures of a finding."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if not isinstance(value, dict):
        return set()
    inner = (x for name, x in value.items() if name != "numbers")
    return set(value).union(*map(keys_of, inner))


def test_run_folder_holds_what_people_look_at(place, unbroken):
    from PIL import Image

    folder = place.run_dir("unbroken")
    assert json.loads((folder / "config.json").read_text())["steps"] == STEPS
    with Image.open(folder / "loss.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
    kept = place.saved_steps("unbroken")
    assert STEPS in kept
    assert len(kept) <= Config().checkpoint.keep_last + Config().checkpoint.keep_best


def test_tensorboard_has_the_same_losses_as_the_metrics(place, unbroken):
    found = collections.defaultdict(dict)
    for event in tensorboard_events(place.run_dir("unbroken")):
        for value in event.summary.value:
            found[value.tag][event.step] = value.simple_value
    for kind in ("train", "eval"):
        expected = {x["step"]: x["loss"] for x in place.lines("unbroken", kind)}
        assert found[f"{kind}/loss"] == pytest.approx(expected, rel=1e-6)


def test_report_has_a_row_per_category_and_three_answers(place, unbroken):
    text = (place.run_dir("unbroken") / "report.md").read_text()
    rows = {
        cells[0]: cells[1:]
        for cells in (
            line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line
        )
    }
    before, *_, after = place.lines("unbroken", "eval")
    tokens = by_group(after, "tokens")
    assert {"category", "all", *tokens} < set(rows)
    total = sum(tokens.values())
    assert rows["all"][:3] == [
        f"{total:,}",
        f"{before['loss']:.3f}",
        f"{after['loss']:.3f}",
    ]
    asked = text.count("## A held-out prompt")
    assert asked == Config().eval.prompts == 3
    for name in ("prompt", "base", "tuned", "reference"):
        assert text.count(f"**{name}**") == asked
    assert "![loss](loss.png)" in text


def test_the_reports_say_what_the_run_is(place, unbroken):
    folder = place.run_dir("unbroken")
    facts = dict(
        re.findall(r"^- ([^:]+): (.*)$", (folder / "report.md").read_text(), re.M)
    )
    lines = place.lines("unbroken", "train")
    numbers = {x.name: x.numbers for x in read_findings(folder)}
    (start,) = history(place, "unbroken")["starts"]
    trained = numbers["parameters"]["trained"]
    assert facts["trained"].startswith(f"{trained:,} of ")
    assert facts["adapters"].startswith(f"lora of rank {RANK} and alpha 32, ")
    assert f"on {numbers['lora targets']['matrices']} matrices" in facts["adapters"]
    assert facts["tokens seen"].startswith(f"{sum(x['tokens'] for x in lines):,}, ")
    assert float(facts["epochs"]) == pytest.approx(
        numbers["epochs"]["epochs"], abs=1e-3
    )
    assert (facts["steps"], facts["seed"]) == (str(STEPS), "0")
    assert facts["devices"] == start["devices"]
    assert facts["code"] == start["provenance"]["code"]
    assert f"jax {jax.__version__}" in facts["versions"]
    assert "research.train" in facts["command"]
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and not re.search(
        r'(src|href)="\w+://', page
    )
    changed = dict(re.findall(r">(config\.[\w.]+)</td>\n<td[^>]*>(.*)</td>", page))
    assert changed["config.lora.rank"] == str(RANK) and "config.seed" not in changed
    written = flat(RunDir(folder).config()).items() - flat(Config()).items()
    assert changed.keys() == {f"config.{x}" for x, _ in written} - {"config.run_dir"}


# -- again, and after an interruption ------------------------------------------------


def test_a_complete_run_is_left_alone(unbroken, again):
    finished, before, after = again
    assert finished.code == 0
    assert "complete" in finished.err
    assert finished.out == ""
    assert before == after
    assert finished.seconds < unbroken.seconds / 2


def test_sigterm_stops_between_steps_and_the_same_command_resumes(place, broken):
    stopped, resumed = broken.stopped, broken.killed
    assert stopped.code == 75, stopped.err
    (step,) = re.findall(r"stopped after step (\d+)", stopped.err)
    assert re.findall(r"^step +(\d+)/", stopped.err, re.M)[-1] == step
    assert f"step {step} restored" in resumed.err
    assert re.findall(r"^step +(\d+)/", resumed.err, re.M)[0] == str(int(step) + 1)


def test_a_run_killed_in_a_save_resumes(place, broken):
    assert broken.killed.code == -signal.SIGKILL, broken.killed.err
    assert broken.last.code == 0, broken.last.err
    assert re.search(r"step \d+ restored", broken.last.err)
    assert torn(place.run_dir("broken") / "checkpoints") == []
    starts = history(place, "broken")["starts"]
    assert "without a word" in starts[1]["cause"]
    assert starts[2]["cause"] == "done"


def test_a_broken_run_equals_the_unbroken_one_exactly(place, unbroken, broken):
    check_equal(place, "broken", "unbroken")
    # Adapters and optimizer, byte by byte.
    assert final_state(place, "broken") == final_state(place, "unbroken")


@pytest.mark.soak
def test_eight_devices_train_as_one_does(place, unbroken, remeshed):
    assert [x.code for x in remeshed] == [75, 0], remeshed[0].err + remeshed[1].err
    assert "data=2, fsdp=2, expert=1, tensor=2" in remeshed[0].out
    one, eight = (place.lines(run, "train") for run in ("unbroken", "remeshed"))
    for name, rtol in (("loss", 1e-5), ("grad_norm", 1e-4)):
        expected = [x[name] for x in one]
        np.testing.assert_allclose([x[name] for x in eight], expected, rtol=rtol)


@pytest.mark.soak
def test_ctrl_c_before_the_first_step_leaves_nothing_behind(place, hurried):
    assert hurried.code not in (0, 75)
    assert "Traceback" not in hurried.err
    assert not place.run_dir("hurried").exists()


# -- talking to a run ----------------------------------------------------------------


def test_compare_shows_the_base_and_the_tuned_answer(talks):
    assert talks["compare"].code == 0, talks["compare"].err
    base, _, tuned = talks["compare"].out.partition("--- tuned\n")
    assert base.startswith("--- base\n")
    assert len(tuned) > 1
    assert base != f"--- base\n{tuned}"


def test_greedy_answers_repeat_and_an_empty_line_forgets(talks):
    assert talks["chat"].code == 0, talks["chat"].err
    answer = talks["compare"].out.partition("--- tuned\n")[2]
    assert talks["chat"].out.startswith(answer + answer)
    assert len(talks["chat"].out) > 2 * len(answer) + 2, "the third is answered, too"


def test_best_is_the_kept_step_with_the_lowest_held_out_loss(place, talks):
    assert talks["chat"].code == 0, talks["chat"].err
    held = {x["step"]: x["loss"] for x in place.lines("unbroken", "eval")}
    known = {
        step: held[max(x for x in held if x <= step)]
        for step in place.saved_steps("unbroken")
    }
    (restored,) = re.findall(r"step (\d+) restored", talks["chat"].err)
    assert known[int(restored)] == min(known.values())


# -- other trainings -----------------------------------------------------------------


def test_full_fine_tuning_trains_and_talks(place, own_chats):
    trained, talk = own_chats
    assert trained.code == 0, trained.err
    everything = sum(x.size for x in tiny_model.random_weights(seed=0).values())
    assert f"{everything:,} trained" in trained.out
    before, after = place.lines("chats", "eval")
    assert after["loss"] < before["loss"]
    assert talk.code == 0, talk.err
    base, _, tuned = talk.out.partition("--- tuned\n")
    assert base != f"--- base\n{tuned}"


@pytest.mark.soak
def test_own_csv_with_mapped_columns_trains(place, own_csv):
    assert own_csv.code == 0, own_csv.err
    assert f"{len(ROWS)}: kind 0 5, kind 1 5, kind 2 5," in own_csv.out
    shown = own_csv.out.partition("marked:")[2]
    assert re.search(r"What is (\d+) plus \1\?", shown)
    assert re.search(r"Adding \d+ doubles it\.<\|im_end\|>", own_csv.out)
    assert re.search(r"\[\[It is \d+, as «anyone» knows\.<\|im_end\|>]]", shown)
    groups = by_group(place.lines("csv", "eval")[-1], "loss").keys()
    assert groups and groups < {f"kind {i}" for i in range(KINDS)}, "4 held out"
    # Other runs here have the edition under which losses were recorded.
    config = RunDir(place.run_dir("csv")).config()
    assert config.data.edition == NEWEST_EDITION


def test_own_chats_train_on_every_answer(place, own_chats):
    shown = own_chats[0].out.partition("marked:")[2]
    assert re.search(
        r"<\|im_start\|>system\nBe brief\.<\|im_end\|>\n"
        r"<\|im_start\|>user\nHello\.<\|im_end\|>\n"
        r"<\|im_start\|>assistant\n\[\[Ask\.<\|im_end\|>]]\n"
        r"<\|im_start\|>user\nWhat is (\d+) plus \1\?<\|im_end\|>\n"
        r"<\|im_start\|>assistant\n\[\[It is \d+, as «anyone» knows\.<\|im_end\|>]]",
        shown,
    ), shown
    (start,) = json.loads((place.run_dir("chats") / "run.json").read_text())["starts"]
    assert [x["step"] for x in place.lines("chats", "train")] == [1, 2]
    assert start["steps"] == 2
    # The config keeps the epochs, so that more of them extend the run.
    config = json.loads((place.run_dir("chats") / "config.json").read_text())
    assert (config["steps"], config["epochs"]) == (-1, 0.75)
    said = re.search(r"one epoch is 3 steps\s+\((\d+)\s+rows", own_chats[0].out)
    epochs = [line["epoch"] for line in place.lines("chats", "train")]
    assert epochs == [8 / int(said[1]), 16 / int(said[1])]
    assert [line["epoch"] for line in place.lines("chats", "eval")] == [0, epochs[1]]
    assert "  epoch 0." in own_chats[0].err
    assert "\n- epochs: 0." in (place.run_dir("chats") / "report.md").read_text()


def test_every_file_format_gives_the_same_records(tmp_path):
    import pyarrow
    from pyarrow import parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False), "utf-8")
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    columns = dataclasses.replace(DataConfig().columns, **COLUMNS)
    found = {}
    for file in tmp_path.iterdir():
        records = list(
            load_rows(DataConfig(path=str(file), columns=columns), 0).records()
        )
        found[file.name] = [(x.turns, x.context, x.category) for x in records]
    assert len(found) == 6
    first = found["rows.jsonl"]
    assert len(first) == len(ROWS)
    assert first[3][0][1].text == ROWS[3]["answer"]
    assert all(records == first for records in found.values())


@pytest.mark.soak
def test_prompts_longer_than_the_context_do_not_lose_the_report(place, long_prompts):
    assert long_prompts.code == 0, long_prompts.err
    assert (place.run_dir("long-prompts") / "report.md").is_file()


# -- the doors -----------------------------------------------------------------------


@pytest.mark.parametrize("module", ["train", "generate"])
def test_help_names_everything(place, module):
    finished = place.run(module, "--help", forked=False)
    assert finished.code == 0
    for knob in flat(Config()) if module == "train" else ():
        assert f"--config.{knob}=" in finished.out
    for flag in ("run", "prompt", "step", "compare") if module == "generate" else ():
        assert f"--{flag}=" in finished.out
