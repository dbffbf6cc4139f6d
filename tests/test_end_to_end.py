"""The real commands in processes of their own, on a tiny model: `train`, `generate`.

What takes long runs once, in the background, two processes at a time: see `chain`.
"""

import collections
import csv
import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_model

from research import jobs, mesh
from research.base import open_base
from research.checkpoint import Checkpointer
from research.config import Config, DataConfig, MeshConfig, flat
from research.data.sources import load_rows
from research.run_dir import RunDir
from research.step import abstract_state

ROOT = Path(__file__).parents[1]
TIMEOUT = 300
STEPS, EVAL_EVERY, RANK = 16, 6, 4
EVALUATIONS = sorted({*range(0, STEPS, EVAL_EVERY), STEPS})

CONFIG = f"""
from research.config import defaults

def get_config():
    config = defaults()
    config.model.weights = "model"
    config.model.dtype = "float32"
    config.steps = {STEPS}
    config.lora.rank = {RANK}
    config.lora.dropout = 0.1
    config.data.seq_len = 256
    config.data.overlength = "drop"
    config.data.batch_size = 8
    config.data.microbatch_size = 4
    config.data.held_out = 128
    config.optim.learning_rate = 1e-2
    config.eval.every = {EVAL_EVERY}
    config.eval.max_new_tokens = 16
    config.checkpoint.every = 5
    config.runtime.peak_tflops = 0.05
    return config
"""
# As many steps as the others make: another number is another program to compile.
FEW_ROWS = ("--config.eval.prompts=1", "--config.data.held_out=4")
QUESTION = "Are whales fish?"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A process that has ended; `out` and `err` are its two streams."""

    code: int
    out: str
    err: str
    seconds: float


class Place:
    """A folder with `model` and `config.py`, and commands that run in it."""

    def __init__(self, folder, cache):
        self.folder, self.cache = folder, cache

    def _popen(self, module, flags, devices):
        settings = ("JAX_", "XLA_", "HF_", "PYTHON", "FORCE_COLOR", "TTY_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(settings)}
        env |= {
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(self.cache),
            "HF_HOME": str(self.cache),
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "COLUMNS": "160",
        }
        return subprocess.Popen(
            [sys.executable, "-m", f"research.{module}", *flags],
            cwd=self.folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, module, *flags, stdin="", devices=1):
        begun = time.monotonic()
        with self._popen(module, flags, devices) as process:
            try:
                out, err = process.communicate(stdin.encode(), timeout=TIMEOUT)
            finally:
                process.kill()
        seconds = time.monotonic() - begun
        return Finished(process.returncode, out.decode(), err.decode(), seconds)

    def train(self, run, *flags, **options):
        return self.run("train", *self._train_flags(run), *flags, **options)

    def generate(self, run, *flags, **options):
        limit = "--max_new_tokens=16"
        return self.run("generate", f"--run=runs/{run}", limit, *flags, **options)

    def _train_flags(self, run):
        return "--config=config.py", f"--config.run_dir=runs/{run}"

    def stop(self, run, said, number, *flags, devices=1):
        """Trains and sends signal `number` at the first line that matches `said`."""
        begun, err = time.monotonic(), []
        with self._popen(
            "train", (*self._train_flags(run), *flags), devices
        ) as process:
            guard = threading.Timer(TIMEOUT, process.kill)
            guard.start()
            # What it prints must not fill the pipe while the other one is read.
            printed = ThreadPoolExecutor(1).submit(process.stdout.read)
            sent = False
            for line in process.stderr:
                err.append(line.decode())
                if not sent and re.match(said, err[-1]):
                    process.send_signal(number)
                    sent = True
            code = process.wait()
            guard.cancel()
        seconds = time.monotonic() - begun
        return Finished(code, printed.result().decode(), "".join(err), seconds)

    def run_dir(self, run):
        return self.folder / "runs" / run

    def lines(self, run, kind):
        text = (self.run_dir(run) / "metrics.jsonl").read_text()
        return [x for x in map(json.loads, text.splitlines()) if x["kind"] == kind]

    def saved_steps(self, run):
        folder = self.run_dir(run) / "checkpoints"
        return sorted(int(x.name) for x in folder.iterdir() if x.name.isdigit())


def step_line(step):
    return rf"step +{step}/{STEPS} "


def snapshot(folder):
    """Every file with its bytes; None where there is no such folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    known = {file: file.read_bytes() for file in files}
    return known if folder.exists() else None


CHAINS = {}


def chain(function):
    """A module fixture `function(place, results)` that runs in the background.

    All that the chosen tests ask for start with the first of them; `results(name)`
    waits for another one, which must stand above.
    """
    name = function.__name__
    CHAINS[name] = function

    @pytest.fixture(scope="module", name=name)
    def fixture(results):
        return results(name)

    return fixture


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    tiny_model.make_tiny_model(folder / "model")
    (folder / "config.py").write_text(CONFIG)
    return Place(folder, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def results(request, place):
    wanted = {name for item in request.session.items for name in item.fixturenames}
    futures = {}

    def result(name):
        return futures[name].result()

    pool = ThreadPoolExecutor(2)
    for name, function in CHAINS.items():
        if name in wanted:
            futures[name] = pool.submit(function, place, result)
    if "refusals" in wanted:
        for name, case in REFUSALS.items():
            futures[name] = pool.submit(refuse, place, result, name, case)
    yield result
    pool.shutdown(cancel_futures=True)


@chain
def unbroken(place, results):
    return place.train("unbroken", "--config.runtime.peak_tflops=0")


@chain
def remeshed(place, results):
    """Begun on eight devices, ended on one."""
    sizes = ("--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    return [
        place.stop("remeshed", step_line(8), signal.SIGTERM, *sizes, devices=8),
        place.train("remeshed"),
    ]


@chain
def broken(place, results):
    """Killed before a checkpoint, stopped, killed between checkpoints, finished."""
    never = "--config.checkpoint.every=1000"
    return [
        place.stop("broken", step_line(1), signal.SIGKILL, never),
        place.stop("broken", step_line(3), signal.SIGINT),
        place.stop("broken", step_line(11), signal.SIGKILL),
        place.train("broken"),
    ]


@chain
def hurried(place, results):
    return place.stop("hurried", "data:", signal.SIGINT)


ROWS = [
    {
        "question": f"What is {i} plus {i}?",
        "passage": f"Adding {i} doubles it." if i % 3 == 0 else "",
        "answer": f"It is {2 * i}, as «anyone» knows.",
        "kind": "sums" if i % 2 else "doubles",
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
    with (place.folder / "own.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    mapped = [f"--config.data.columns.{k}={v}" for k, v in COLUMNS.items()]
    return place.train("csv", "--config.data.path=own.csv", *mapped, *FEW_ROWS)


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
        "--config.model.dtype=bfloat16",
        "--config.steps=2",
    )
    path = "--config.data.path=own.jsonl.gz"
    trained = place.train("chats", path, *full, *FEW_ROWS)
    return trained, place.generate("chats", f"--prompt={QUESTION}", "--compare")


@chain
def long_prompts(place, results):
    """Contexts that training cuts to fit and that do not fit as prompts."""
    with (place.folder / "long.jsonl").open("w") as file:
        for i in range(12):
            row = {"instruction": f"What of {i}?", "context": "word " * 150}
            print(json.dumps(row | {"response": f"Much of {i}."}), file=file)
    truncate = "--config.data.overlength=truncate"
    path = "--config.data.path=long.jsonl"
    return place.train("long", path, truncate, *FEW_ROWS)


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
    return {
        "chat": place.generate("unbroken", stdin=chat),
        "compare": place.generate("unbroken", f"--prompt={QUESTION}", "--compare"),
        "best": place.generate("unbroken", f"--prompt={QUESTION}", "--step=best"),
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
    for file in (ROOT / "research/data/sample").iterdir():
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
    assert "mesh data=1, fsdp=1, tensor=1 on cpu" in told
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
        for file in (ROOT / "research/data/sample").iterdir()
        for line in file.read_text("utf-8").splitlines()
    ]
    expected = [
        f"marked: <|im_start|>user {row['instruction']} {row['context']}<|im_end|> "
        f"<|im_start|>assistant [[{row['response']}<|im_end|>]]"
        for row in rows
    ]
    squeezed = [" ".join(x.replace(" <|im_end", "<|im_end").split()) for x in expected]
    assert any(x in shown for x in squeezed), unbroken.out


def test_a_plain_line_for_every_step(place, unbroken):
    form = re.compile(
        rf"step +(\d+)/{STEPS}  ETA \d+:\d\d  loss (\S+)  eval (\S+)  lr (\S+)  "
        r"norm (\S+)  [\d,]+ tok/s  [\d,]+ trained/s  MFU \d+%  \d+\.\d GB$",
        re.M,
    )
    train = place.lines("unbroken", "train")
    assert [found.group(1, 2, 4, 5) for found in form.finditer(unbroken.err)] == [
        (
            str(line["step"]),
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
    total = sum(after["tokens"].values())
    mean = sum(n * after["by_category"][c] for c, n in after["tokens"].items()) / total
    assert mean == pytest.approx(after["loss"], rel=1e-6)


@pytest.mark.parametrize("run", ["unbroken", "broken"])
def test_metrics_have_every_step_exactly_once(place, run, request):
    request.getfixturevalue(run)
    assert [x["step"] for x in place.lines(run, "train")] == [*range(1, STEPS + 1)]
    assert [x["step"] for x in place.lines(run, "eval")] == EVALUATIONS


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
    from tensorboardX.proto.event_pb2 import Event

    found = collections.defaultdict(dict)
    (file,) = (place.run_dir("unbroken") / "tensorboard").iterdir()
    data, at = file.read_bytes(), 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        at += size + 16
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
    assert {"category", "all", *after["tokens"]} < set(rows)
    total = sum(after["tokens"].values())
    assert rows["all"][:3] == [
        f"{total:,}",
        f"{before['loss']:.3f}",
        f"{after['loss']:.3f}",
    ]
    asked = text.count("## A held-out prompt")
    assert asked == Config().eval.prompts == 3
    for name in ("prompt", "base", "adapted", "reference"):
        assert text.count(f"**{name}**") == asked
    assert "![loss](loss.png)" in text


# -- again, and after an interruption ------------------------------------------------


def test_a_complete_run_is_left_alone(unbroken, again):
    finished, before, after = again
    assert finished.code == 0
    assert "complete" in finished.err
    assert finished.out == ""
    assert before == after
    assert finished.seconds < unbroken.seconds / 2


def numbers(place, run):
    """What must not depend on how often a run was broken off."""
    train = [
        (x["step"], x["loss"], x["grad_norm"], x["learning_rate"], x["tokens"])
        for x in place.lines(run, "train")
    ]
    held = {x["step"]: (x["loss"], x["by_category"]) for x in place.lines(run, "eval")}
    return train, held


def final_state(place, run):
    folder = RunDir(place.run_dir(run))
    config = folder.config()
    job = jobs.make_job(
        config,
        open_base(str(place.folder / config.model.weights)),
        mesh.make_mesh(MeshConfig(data=1), jax.devices()[:1]),
    )
    with Checkpointer(
        folder.checkpoints, config.checkpoint, folder.identity(), read_only=True
    ) as checkpointer:
        restored = checkpointer.restore(abstract_state(job))
    assert restored.step == int(restored.state.step) == STEPS
    return jax.tree.map(lambda x: np.asarray(x).tobytes(), restored.state)


def test_sigint_stops_between_steps_and_the_same_command_goes_on(broken):
    stopped, resumed = broken[1:3]
    assert stopped.code == 75, stopped.err
    (step,) = re.findall(r"stopped after step (\d+)", stopped.err)
    assert re.findall(r"^step +(\d+)/", stopped.err, re.M)[-1] == step
    assert f"step {step} restored" in resumed.err
    assert re.findall(r"^step +(\d+)/", resumed.err, re.M)[0] == str(int(step) + 1)


def test_a_killed_run_goes_on_from_its_last_checkpoint(broken):
    assert [x.code for x in broken[::2]] == [-signal.SIGKILL, -signal.SIGKILL]
    assert "restored" not in broken[1].err, "there was no checkpoint yet"
    assert broken[3].code == 0, broken[3].err
    assert 4 < int(re.findall(r"step (\d+) restored", broken[3].err)[0]) < STEPS


def test_a_broken_run_equals_the_unbroken_one_exactly(place, unbroken, broken):
    assert numbers(place, "broken") == numbers(place, "unbroken")
    # Adapters and optimizer, byte by byte.
    assert final_state(place, "broken") == final_state(place, "unbroken")


def test_eight_devices_train_as_one_does(place, unbroken, remeshed):
    assert [x.code for x in remeshed] == [75, 0], remeshed[0].err + remeshed[1].err
    assert "data=2, fsdp=2, tensor=2" in remeshed[0].out
    one, eight = (place.lines(run, "train") for run in ("unbroken", "remeshed"))
    for name, rtol in (("loss", 1e-5), ("grad_norm", 1e-4)):
        expected = [x[name] for x in one]
        np.testing.assert_allclose([x[name] for x in eight], expected, rtol=rtol)


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
    assert talks["best"].code == 0, talks["best"].err
    held = {x["step"]: x["loss"] for x in place.lines("unbroken", "eval")}
    known = {
        step: held[max(x for x in held if x <= step)]
        for step in place.saved_steps("unbroken")
    }
    (restored,) = re.findall(r"step (\d+) restored", talks["best"].err)
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


def test_own_csv_with_mapped_columns_trains(place, own_csv):
    assert own_csv.code == 0, own_csv.err
    assert f"{len(ROWS)}: doubles 20, sums 20" in own_csv.out
    shown = own_csv.out.partition("marked:")[2]
    assert re.search(r"What is (\d+) plus \1\?", shown)
    assert re.search(r"Adding \d+ doubles it\.<\|im_end\|>", own_csv.out)
    assert re.search(r"\[\[It is \d+, as «anyone» knows\.<\|im_end\|>]]", shown)
    assert place.lines("csv", "eval")[-1]["by_category"].keys() == {"doubles", "sums"}


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
    assert len(place.lines("chats", "train")) == 2


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
        records = load_rows(DataConfig(path=str(file), columns=columns), 0).records
        found[file.name] = [(x.turns, x.context, x.category) for x in records]
    assert len(found) == 6
    first = found["rows.jsonl"]
    assert len(first) == len(ROWS)
    assert first[3][0][1].text == ROWS[3]["answer"]
    assert all(records == first for records in found.values())


def test_prompts_longer_than_the_context_do_not_lose_the_report(place, long_prompts):
    assert long_prompts.code == 0, long_prompts.err
    assert (place.run_dir("long") / "report.md").is_file()


# -- what is refused -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Flags, what the message must name, and what has to be there first."""

    flags: tuple[str, ...]
    names: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()
    prepare: str = ""
    devices: int = 1
    command: str = "train"


def bad_file(name, text, *names, flags=()):
    path = f"--config.data.path={name}"
    return Refusal((path, *flags), names, files=((name, text),))


GOOD = '{"instruction": "a", "response": "b"}\n'

REFUSALS = {
    "missing data": Refusal(
        ("--config.data.path=absent.jsonl",), ("absent.jsonl", "config.data.path")
    ),
    "malformed line": bad_file(
        "torn.jsonl", GOOD + GOOD + '{"instruction":\n', "torn.jsonl:3", "bad_lines"
    ),
    "unknown column": bad_file(
        "columns.jsonl",
        GOOD,
        "columns.response",
        "'anser'",
        "'instruction', 'response'",
        flags=("--config.data.columns.response=anser",),
    ),
    "no usable row": bad_file(
        "none.jsonl", GOOD.replace("b", ""), "none.jsonl", "no usable row"
    ),
    "all too long": Refusal(("--config.data.seq_len=8",), ("config.data.seq_len=8",)),
    "unknown target": Refusal(
        ("--config.lora.targets=('quary',)",),
        ("'quary'", "'query'", "layers.attention.query.kernel", "layers.mlp.up.kernel"),
    ),
    "broken pattern": Refusal(("--config.lora.targets=('mlp(',)",), ("mlp(",)),
    "rank 0": Refusal(("--config.lora.rank=0",), ("config.lora.rank", "0")),
    "negative seed": Refusal(("--config.seed=-1",), ("config.seed", "-1")),
    "mistyped choice": Refusal(
        ("--config.model.dtype=bfloat",), ("config.model.dtype", "'bfloat16'")
    ),
    "mesh for other devices": Refusal(
        ("--config.mesh.data=3",), ("data=3", "8 devices"), devices=8
    ),
    "mesh that cuts heads": Refusal(
        ("--config.mesh.tensor=4",),
        ("kv_heads", "size 2", "tensor=4", "config.mesh.tensor", "1, 2"),
        devices=8,
    ),
    "missing weights": Refusal(
        ("--config.model.weights=absent",), ("'absent'", "hub://", "pkg://")
    ),
    "weights that do not fit": Refusal(
        ("--config.model.weights=misfit",),
        ("do not fit", "mlp.gate_proj.weight", "[128, 64]", "[96, 64]"),
        prepare="misfit",
    ),
    "another config": Refusal(("--config.seed=1",), ("seed: 0 -> 1",), prepare="copy"),
    "another base": Refusal((), ("base model:", "run_dir"), prepare="base"),
    "another base's checkpoint": Refusal(
        (), ("checkpoint", "base model:"), prepare="checkpoint"
    ),
    "run_dir under a file": Refusal(
        ("--config.run_dir=config.py/run",), ("config.py/run", "--config.run_dir")
    ),
    "run_dir of something else": Refusal(
        ("--config.run_dir=model",), ("model/config.json",)
    ),
    "run_dir that is a file": Refusal(
        ("--config.run_dir=config.py",), ("config.py", "--config.run_dir")
    ),
    "no run_dir": Refusal(("--config.run_dir=",), ("config.run_dir",)),
    "mistyped knob": Refusal(
        ("--config.lora.rnak=4",), ("config.lora.rnak", "'config.lora.rank'")
    ),
    "wrong type": Refusal(("--config.steps=many",), ("config.steps", "'many'")),
    "wrong type in the config": Refusal(
        ("--config=typed.py",),
        ("rank", "four", "int"),
        files=(("typed.py", CONFIG.replace(f"= {RANK}", "= 'four'")),),
    ),
    "mistyped knob in the config": Refusal(
        ("--config=mistyped.py",),
        ("rnak", "rank"),
        files=(("mistyped.py", CONFIG.replace("lora.rank", "lora.rnak")),),
    ),
    "missing config": Refusal(("--config=absent.py",), ("absent.py",)),
    "no config": Refusal(
        ("--config.steps=3",), ("--config=FILE.py",), command="bare train"
    ),
    "stray argument": Refusal(("steps=3",), ("'steps=3'",)),
    "talk: no run": Refusal(
        ("--run=runs/absent",), ("runs/absent", "config.json"), command="generate"
    ),
    "talk: no run named": Refusal(("--prompt=x",), ("--run",), command="generate"),
    "talk: unknown step": Refusal(
        ("--step=7", "--prompt=x"), ("'7'", str(STEPS)), prepare="copy",
        command="generate",
    ),
    "talk: another base": Refusal(
        ("--prompt=x",), ("base model:",), prepare="base", command="generate"
    ),
    "talk: too long a prompt": Refusal(
        (f"--prompt={'word ' * 200}",), ("512",), prepare="copy", command="generate"
    ),
    "talk: mistyped flag": Refusal(("--promt=x",), ("promt",), command="generate"),
}  # fmt: skip


def refuse(place, results, name, case):
    """Runs it; returns how it ended and whether its run directory is as it was."""
    run = name.replace(" ", "-").replace(":", "").replace("'", "")
    for file, text in case.files:
        (place.folder / file).write_text(text)
    if case.prepare == "misfit":
        make_misfit(place.folder / "model", place.folder / "misfit")
    if case.prepare in ("copy", "base", "checkpoint"):
        results("unbroken")
        shutil.copytree(place.run_dir("unbroken"), place.run_dir(run))
        (place.run_dir(run) / "complete.json").unlink()
    if case.prepare in ("base", "checkpoint"):
        place = change_base(place, run, everywhere=case.prepare == "checkpoint")
    before = snapshot(place.run_dir(run))
    if case.command == "train":
        finished = place.train(run, *case.flags, devices=case.devices)
    else:
        known = [f"--run=runs/{run}"] if case.prepare else []
        module = case.command.removeprefix("bare ")
        finished = place.run(module, *known, *case.flags)
    return finished, before == snapshot(place.run_dir(run))


def make_misfit(model, copy):
    shutil.copytree(model, copy)
    config = tiny_model.CONFIG | {"intermediate_size": 96}
    (copy / "config.json").write_text(json.dumps(config))


def change_base(place, run, everywhere):
    """The run moved to where `model` is another; `everywhere`: its papers say so."""
    moved = Place(place.folder / f"moved-{run}", place.cache)
    tiny_model.make_tiny_model(moved.folder / "model", seed=1)
    shutil.copy(place.folder / "config.py", moved.folder)
    shutil.move(place.run_dir(run), moved.run_dir(run))
    if everywhere:
        identity = moved.run_dir(run) / "identity.json"
        now = open_base(str(moved.folder / "model")).fingerprint
        said = json.loads(identity.read_text())
        identity.write_text(json.dumps(said | {"base model": now}, indent=2))
    return moved


@pytest.fixture(scope="module")
def refusals(results):
    return results


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_one_message_and_nothing_written(name, refusals, unbroken):
    finished, untouched = refusals(name)
    said = finished.err
    assert finished.code == 2, said
    assert "Traceback" not in said
    assert len(re.findall("^error: ", said, re.M)) == 1, said
    message = said.partition("error: ")[2]
    for part in REFUSALS[name].names:
        assert part in message
    assert untouched


# -- the doors -----------------------------------------------------------------------


@pytest.mark.parametrize("module", ["train", "generate"])
def test_help_is_quick_and_names_everything(place, module):
    finished = place.run(module, "--help")
    assert finished.code == 0
    assert finished.seconds < 3
    for knob in flat(Config()) if module == "train" else ():
        assert f"--config.{knob}=" in finished.out
    for flag in ("run", "prompt", "step", "compare") if module == "generate" else ():
        assert f"--{flag}=" in finished.out


def test_make_help_lists_every_target():
    make = shutil.which("make") or pytest.skip("no make here")
    # Under `make test` these would make it talk of a make within a make.
    apart = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    finished = subprocess.run(
        [make, "help"], cwd=ROOT, capture_output=True, text=True, check=True, env=apart
    )
    (phony,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.M)
    told = dict(line.split("\t") for line in finished.stdout.splitlines())
    assert set(told) == set(phony.split())
    assert all(text.strip() for text in told.values())


VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def bare(tmp_path):
    """A PATH with an old Python alone, and an empty HOME."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "cat").symlink_to(shutil.which("cat"))
    old = bin_folder / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    return {"PATH": str(bin_folder), "HOME": str(tmp_path / "home")}


def find_python(env):
    return subprocess.run(
        [shutil.which("bash"), ROOT / "launch/find_python.sh"],
        env=env,
        capture_output=True,
        text=True,
    )


def test_no_usable_python_is_said_with_what_to_do(bare):
    finished = find_python(bare)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("error: no Python of 3.13 3.12 3.11")
    for remedy in ("apt-get install", "pyenv install", "uv python", "PYTHON="):
        assert remedy in finished.stderr


def test_a_named_python_is_taken_or_refused_but_never_replaced(bare):
    finished = find_python(bare | {"PYTHON": "nonsense"})
    assert (finished.returncode, finished.stdout) == (1, "")
    assert finished.stderr.startswith("error: PYTHON=nonsense")
    finished = find_python(bare | {"PYTHON": sys.executable})
    assert finished.stdout.strip() == sys.executable


@pytest.mark.parametrize(
    "inner",
    [
        f".pyenv/versions/{VERSION}.7/bin/python",
        f".local/share/uv/python/cpython-{VERSION}.7-linux-x86_64-gnu/bin/python3",
    ],
    ids=["pyenv", "uv"],
)
def test_an_interpreter_off_the_path_is_found(bare, inner):
    hidden = Path(bare["HOME"]) / inner
    hidden.parent.mkdir(parents=True)
    hidden.symlink_to(sys.executable)
    finished = find_python(bare)
    assert finished.stdout.strip() == str(hidden), finished.stderr
