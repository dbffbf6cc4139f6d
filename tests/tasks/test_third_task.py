"""A third task in one file: pairs of answers, a margin between them, two metrics.

It is registered as any task is, and the real loop, log, report, resume and planner run
it. Nothing outside of this file knows of pairs.
"""

import dataclasses
import functools
import gc
import hashlib
import itertools
import json
import re
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_model
from helpers import TINY, close, random_params
from small_run import as_killed

from research.config.choices import TASK_MODULES
from research.config.knobs import check_limits
from research.config.run_config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
)
from research.core.errors import UserError
from research.data.batch_order import OrderedBatches, endless
from research.data.grouped_values import by_group
from research.data.metric_sums import Ratio, sum_by_group
from research.data.token_batch import Batch
from research.parallel import mesh as meshes
from research.plan import abstract_step, planner
from research.plan.compiled import compile_step
from research.plan.planned_devices import parse_device
from research.runs.metrics_file import read_metrics
from research.tasks.findings import Finding
from research.tasks.pretraining import PlainFormat
from research.tasks.row_preview import PreviewDocument, PreviewRow, PreviewSpan
from research.tasks.task_protocol import TaskKind
from research.train import start_to_report
from research.train.step import train_step
from research.weights import trainable
from research.weights.parameter_spec import Spec

MARGIN, HELD_OUT, STEPS, SEQ = 1.0, 6, 4, 48


# The task: all that a third one needs.


@dataclasses.dataclass(frozen=True)
class MarginObjective:
    """A chosen answer should be likelier, per token, than the rejected one below it."""

    groups: int
    rows_per_unit: int = 2
    loss_unit: str = "margin loss per pair"

    def train(self, model, params, batch):
        losses, sums = self._sums(model, params, batch)
        return jnp.sum(losses), sums

    def evaluate(self, model, params, batch):
        return self._sums(model, params, batch)[1]

    def _sums(self, model, params, batch):
        hidden = model.hidden(params, batch.tokens, batch.positions, batch.segments)
        logs = jax.nn.log_softmax(model.logits(params, hidden), axis=-1)
        picked = jnp.take_along_axis(logs, batch.targets[..., None], -1)[..., 0]
        trained = jnp.sum(batch.weights, axis=-1)
        scores = jnp.sum(picked * batch.weights, axis=-1) / jnp.maximum(trained, 1.0)
        gaps = scores[0::2] - scores[1::2]
        there = (trained[0::2] > 0).astype(jnp.float32)
        losses = there * jax.nn.relu(MARGIN - gaps)

        def summed(values):
            return sum_by_group(values, batch.groups[0::2, 0], self.groups)

        count = summed(there)
        return losses, {
            "loss": Ratio(summed(losses), count),
            "accuracy": Ratio(summed(there * (gaps > 0)), count),
            "margin": Ratio(jnp.sum(there * gaps), jnp.sum(there)),
        }


class PairTask:
    def __init__(self, config, base):
        self.held_out_bytes, self.left_out = {}, []
        with open(config.data.path, "rb") as file:
            text = file.read()
        self.origin, self.sha256 = config.data.path, hashlib.sha256(text).hexdigest()
        self._config, self._tokenizer = config, base.tokenizer
        rows = [json.loads(line) for line in text.splitlines()]
        self.groups = sorted({row["topic"] for row in rows})
        pairs = [self._pair(row) for row in rows]
        self._train, self._held_out = pairs[HELD_OUT:], pairs[:HELD_OUT]

    def _pair(self, row):
        """Two rows of `tokens, targets, weights, segments, positions, groups`."""
        rows = []
        for answer in (row["chosen"], row["rejected"]):
            prompt, ids = self._tokenizer.encode_texts([row["prompt"], answer])
            ids = np.array([*prompt, *ids, self._tokenizer.eos], np.int32)
            fields = np.zeros((6, SEQ), np.int32)
            n = len(ids) - 1
            fields[:2, :n] = ids[:-1], ids[1:]
            fields[2, len(prompt) - 1 : n] = 1
            fields[3, :n], fields[4, :n] = 1, np.arange(n)
            fields[5] = self.groups.index(row["topic"])
            rows.append(fields)
        return rows

    def _batch(self, pairs):
        rows = np.stack([row for pair in pairs for row in pair], axis=1)
        tokens, targets, weights, segments, positions, groups = rows
        return Batch(
            tokens, targets, np.float32(weights), segments, positions, groups,
            rows_per_unit=2,
        )  # fmt: skip

    @property
    def rows(self):
        return 2 * len(self._train)

    def batches(self, mine):
        return OrderedBatches(
            endless(0, len(self._train), self._config.seed),
            lambda numbers: self._batch([self._train[int(i)] for i in numbers]),
            self._config.data.batch_size // 2,
            [row // 2 for row in mine[::2]],
        )

    def held_out(self, rows, mine):
        empty = [np.zeros((6, SEQ), np.int32)] * 2
        pairs = self._held_out + [empty] * (-len(self._held_out) % (rows // 2))
        parts = [pairs[i : i + rows // 2] for i in range(0, len(pairs), rows // 2)]
        return [self._batch([part[row // 2] for row in mine[::2]]) for part in parts]

    def examine(self):
        return [Finding("pairs", f"{len(self._train)} train")]

    def preview(self, count):
        rows = [row for pair in self._train for row in pair][:count]
        return [
            PreviewRow((PreviewDocument("", "", (self._span(row[0]),)),))
            for row in rows
        ]

    def _span(self, ids):
        return PreviewSpan(tuple(ids.tolist()), self._tokenizer.decode(ids), False)

    def sample(self, step, model):
        return []

    def asked(self):
        return []

    def not_asked(self):
        return []


KIND = TaskKind(
    load=PairTask,
    objective=lambda config, mesh, groups: MarginObjective(groups),
    expected_groups=lambda config: 2,
    prompt_format=lambda config, base: PlainFormat(base.tokenizer),
)


# The proof.


def make_config(folder, name, **data):
    rows = {"seq_len": SEQ, "batch_size": 32, "microbatch_size": 16, **data}
    return Config(
        run_dir=str(folder / name),
        steps=STEPS,
        model=ModelConfig(init_from=str(folder / "model"), dtype="float32"),
        lora=LoRAConfig(rank=4, dropout=0.0, targets=("mlp",)),
        data=DataConfig(kind="pairs", path=str(folder / "pairs.jsonl"), **rows),
        optim=OptimConfig(learning_rate=3e-2, warmup=0.0),
        eval=EvalConfig(every=2, max_new_tokens=4),
        checkpoint=CheckpointConfig(every=2),
        runtime=RuntimeConfig(
            compilation_cache="", peak_tflops=0.05, watchdog_s=0, progress="lines"
        ),
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`unbroken`; and `resumed`, killed after the save of step 2."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny_model.make_tiny_model(folder / "model")
    rows = [
        {
            "topic": "odd" if i % 2 else "even",
            "prompt": f"{i} + 1 is ",
            "chosen": f"{i + 1}.",
            "rejected": f"{i} or so, who knows" if i % 3 else "?",
        }
        for i in range(30)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASK_MODULES, "pairs", __name__)
        patch.setattr(start_to_report.runtime, "start", lambda config: None)
        assert start_to_report.train([make_config(folder, "unbroken")]) == 0
        as_killed(folder / "unbroken", 2, folder / "resumed")
        assert start_to_report.train([make_config(folder, "resumed")]) == 0
        yield folder


def lines(runs, name, kind):
    return [line for line in read_metrics(runs / name) if line["kind"] == kind]


def test_the_kind_is_a_choice_of_the_config_while_it_is_registered(runs, monkeypatch):
    config = make_config(runs, "new")
    check_limits(config, "config.")
    monkeypatch.delitem(TASK_MODULES, "pairs")
    with pytest.raises(UserError, match=r"data\.kind is 'pairs'.*instructions, text"):
        check_limits(config, "config.")


def test_it_learns_and_its_metrics_are_in_every_line(runs):
    train, held = (lines(runs, "unbroken", kind) for kind in ("train", "eval"))
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    assert [line["step"] for line in held] == [0, 2, 4]
    assert held[-1]["loss"] < held[0]["loss"] and held[-1]["margin"] > held[0]["margin"]
    for line in [*train, *held]:
        assert 0.0 <= line["accuracy"] <= 1.0
        assert by_group(line, "loss").keys() == by_group(line, "accuracy").keys()
        assert not by_group(line, "margin")
    assert by_group(held[0], "loss").keys() == {"even", "odd"}
    assert by_group(held[0], "tokens") == {"even": 3, "odd": 3}
    assert held[0]["metrics"] == "accuracy,margin"
    assert held[0]["loss_unit"] == "margin loss per pair"
    accuracies = by_group(held[0], "accuracy").values()
    assert held[0]["accuracy"] == pytest.approx(sum(accuracies) / 2)


class Bigrams:
    """The smallest model that trains: a row of logits for each token."""

    specs = MappingProxyType(
        {"table": Spec((TINY.vocab, TINY.vocab), ("vocab", "embed"))}
    )

    def hidden(self, params, tokens, positions, segments):
        return params["table"][tokens]

    def logits(self, params, hidden):
        return hidden

    def keys_seen(self, positions):
        return jnp.zeros(positions.shape)  # It attends to none.


def test_sums_divide_once_whatever_the_microbatches():
    """One half has two real pairs and the other one: a mean of means differs."""
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    model, params = Bigrams(), random_params(Bigrams.specs)
    split = trainable.make("full", ModelConfig(), LoRAConfig(), model.specs)
    definition = train_step.StepDefinition(
        model, split, optax.sgd(0.1), mesh, MarginObjective(2)
    )
    rng = np.random.default_rng(0)
    ids, ones = rng.integers(0, TINY.vocab, (8, 12), np.int32), np.ones((8, 12), int)
    weights = np.float32(rng.integers(0, 2, (8, 12)) * (np.arange(8) < 5)[:, None])
    whole = Batch(ids, ids[:, ::-1], weights, ones, ones.cumsum(1) - 1, ones, 2)
    step = jax.jit(functools.partial(train_step.train_step, definition))
    one, other = (
        step(
            train_step.init_state(definition, params),
            {},
            jax.tree.map(lambda x, n=n: jnp.array(x).reshape(n, -1, 12), whole),
        )
        for n in (1, 2)
    )
    assert one[1]["sums"]["loss"].denominator.tolist() == [0.0, 3.0]
    close(one[1]["means"], other[1]["means"])
    close(one[0].params, other[0].params)
    assert np.abs(one[0].params["table"] - params["table"]).max() > 1e-3


def test_stopped_and_continued_equals_unbroken(runs):
    check_equal(runs, "resumed")


@pytest.mark.soak
def test_a_crash_after_three_batches_and_a_resume_equal_unbroken(runs, monkeypatch):
    pulled = itertools.count()

    def crash(batches, pull=OrderedBatches.__next__):
        if next(pulled) == 3:
            raise RuntimeError("power is lost")
        return pull(batches)

    config = make_config(runs, "crashed")
    with monkeypatch.context() as patch:
        patch.setattr(OrderedBatches, "__next__", crash)
        with pytest.raises(RuntimeError, match="power is lost"):
            start_to_report.train([config])
    assert [line["step"] for line in lines(runs, "crashed", "train")] == [1, 2]
    gc.collect()  # Frames of the traceback hold the lock of the run directory.
    assert start_to_report.train([config]) == 0
    check_equal(runs, "crashed")


def check_equal(runs, resumed):
    """A run that resumed from step 2 has the numbers of `unbroken`."""
    timing = {"step_s", "elapsed_s", "tokens_per_s", "trained_tokens_per_s"}
    timing |= {"mfu", "memory_gb", "goodput", "seconds", "time"}
    for kind in ("train", "eval"):
        one, other = (
            [
                {k: v for k, v in x.items() if k.partition("/")[0] not in timing}
                for x in found
            ]
            for found in (lines(runs, name, kind) for name in ("unbroken", resumed))
        )
        assert one == other and len(one) >= 3
    history = json.loads((runs / resumed / "run.json").read_text())
    assert [start["first"] for start in history["starts"]] == [0, 2]


def test_the_report_has_its_columns_and_no_perplexity(runs):
    report = (runs / "unbroken" / "report.md").read_text()
    [header] = re.findall(r"^\| category .*$", report, re.MULTILINE)
    for name in ("counted", "loss base", "accuracy base", "margin base"):
        assert name in header
    assert "ppl" not in header
    held = lines(runs, "unbroken", "eval")
    [row] = re.findall(r"^\| all .*$", report, re.MULTILINE)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    shown = [f"{line['accuracy']:.3f}" for line in (held[0], held[-1])]
    assert cells[1] == str(HELD_OUT) and cells[5:7] == shown
    assert (runs / "unbroken" / "loss.png").stat().st_size > 10_000


def test_the_planner_sees_its_objective_and_batch(runs):
    config = make_config(runs, "planned")
    architecture = abstract_step.find_architecture(config)
    mesh = meshes.make_mesh(config.mesh)
    step = abstract_step.make_abstract_step(config, architecture, mesh)
    assert step.definition.objective == MarginObjective(2)
    assert step.batch.rows_per_unit == 2
    text = compile_step.lower(step).as_text()
    loss = train_step.jit_train_step(step.definition)
    assert text == loss.lower(step.state, step.frozen, step.batch).as_text()
    # Its logits, of the two rows of a device, which no cross entropy in chunks forms.
    assert re.search(rf"tensor<\d+x{SEQ}x{architecture.vocab}xf32>", text)


def test_a_pair_is_never_split(runs):
    config = make_config(runs, "split", batch_size=8, microbatch_size=0)
    said = (
        r"has 8 rows .*microbatch_size.*2 rows belong together.*splits a batch into 8"
        r".*multiple of 16"
    )
    with pytest.raises(UserError, match=said):
        start_to_report.train([config])
    assert not (runs / "split").exists()
    architecture = abstract_step.find_architecture(config)
    with pytest.raises(UserError, match=said):
        planner.plan_estimate(config, architecture, parse_device("h100:8"))
    rows = np.zeros((8, SEQ), np.int32)
    batch = Batch(rows, rows, np.float32(rows), rows, rows, rows, rows_per_unit=2)
    mesh = meshes.make_mesh(MeshConfig())
    with pytest.raises(UserError, match="2 rows belong together"):
        meshes.to_global(batch, mesh)
