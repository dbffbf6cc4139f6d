"""The real train step of a config on random weights and random tokens: its speed.

    python tests/bench/random_step.py --rows=4 --seq=256

Needs neither data nor weights nor a network: everything else is what training runs,
on one device, whose peak the MFU counts against (CPUs have no data sheet: MFU is -).
Seconds are the median of the steps after a warm-up. Memory is the most that the device
(on CPU: the process) held, the drawing of the weights included. On CPU set the
GLIBC_TUNABLES of the Makefile, as `make` does for training.
"""

import argparse
import ast
import dataclasses
import json
import runpy
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from random_rows import random_rows

from research.config import command_line
from research.config.run_config import Config, from_config_dict
from research.core.errors import UserError
from research.data.token_batch import Batch
from research.formats.base_model import Base
from research.models.architecture import Architecture
from research.parallel import chips, runtime
from research.parallel import mesh as meshes
from research.plan import abstract_step
from research.tokenize.tokenizer import Tokenizer
from research.train.metrics import throughput
from research.train.step import train_step
from research.train.step.definition_from_config import load_start
from research.weights import parameter_paths

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The cost of one step of a config on one device.

    Attributes:
      device: as JAX names it.
      tokens_per_s: of all tokens in the rows; random rows have no padding.
      step_s: seconds of one optimizer update.
      flops_per_s: FLOPs that the model needs, see `metrics.FlopCount`, a second.
      mfu: those as a share of the device's peak; None where that is not known.
      memory_gb: peak, in 10**9 bytes.
      positions: that carry a loss, of a step.
      trained: scalars that are trained.
      loss: of the last step, which tells a broken step from a fast one.
    """

    device: str
    tokens_per_s: float
    step_s: float
    flops_per_s: float
    mfu: float | None
    memory_gb: float
    positions: int
    trained: int
    loss: float


def read_config(path: str, changes: dict[str, Any]) -> Config:
    """A config file with other knobs, as `--config.KNOB=VALUE` would set them.

    Raises:
      UserError: there is no such file or knob, or a value does not fit.
    """
    file = Path(path) if Path(path).is_file() else ROOT / path
    if not file.is_file():
        raise UserError(f"--config={path} is not a file; see configs/")
    config = runpy.run_path(str(file))["get_config"]()
    for knob, value in changes.items():
        try:
            config.update_from_flattened_dict({knob: value})
        except (KeyError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"knob {knob}={value!r}: {reason}") from error
    return from_config_dict(config)


def make_batch(
    step: abstract_step.AbstractStep, trained: float, documents: int
) -> Batch:
    """Random rows for a step, on its device."""
    passes, rows, seq = step.batch.tokens.shape
    vocab = step.architecture.vocab
    drawn = random_rows((passes * rows, seq), vocab, trained, documents)
    groups = np.zeros((passes * rows, seq), np.int32)
    return meshes.to_global(Batch(groups=groups, **drawn), step.definition.mesh, passes)


class RandomStep:
    """The train step of a config on random weights and rows, with its state so far."""

    def __init__(
        self, config: Config, architecture: Architecture, trained: float, documents: int
    ):
        """Draws weights and rows; the arguments are those of `measure`."""
        mesh = meshes.make_mesh(config.mesh, jax.devices()[:1])
        self.abstract = step = abstract_step.make_abstract_step(
            config, architecture, mesh
        )
        # Weights that are drawn need no tokenizer, rows that are drawn neither.
        base = Base("random", architecture, cast(Tokenizer, None), None)
        params, self._frozen = load_start(step.definition, base)
        self.state = train_step.jit_init(step.definition)(params)
        self.model = step.definition.model
        self._batch = make_batch(step, trained, documents)
        self._train = train_step.jit_train_step(step.definition)
        self.sums: Any = None

    def run(self) -> float:
        """One update. Returns its seconds; the first one compiles."""
        begun = time.perf_counter()
        self.state, self.sums = self._train(self.state, self._frozen, self._batch)
        jax.block_until_ready((self.state, self.sums))
        return time.perf_counter() - begun

    def compiled_text(self) -> str:
        """The program of `run`, as the compiler prints it."""
        arguments = self.state, self._frozen, self._batch
        return self._train.lower(*arguments).compile().as_text()


def measure(
    config: Config,
    architecture: Architecture,
    *,
    trained: float,
    documents: int,
    steps: int,
    warmup: int,
) -> Measured:
    """Draws weights and rows, runs `warmup` steps and times `steps` more.

    Args:
      config: whose `data` says how many rows, and how many a pass.
      architecture: of the model.
      trained: share of the positions that carry a loss.
      documents: of each row.
      steps: that count.
      warmup: that do not; the first of them compiles.
    """
    device = jax.devices()[0]
    step = RandomStep(config, architecture, trained, documents)
    seconds = [step.run() for _ in range(warmup + steps)]
    sums = step.sums
    step_s = statistics.median(seconds[warmup:])
    count = parameter_paths.count(step.state.params)
    used = throughput.count_used(step.state.params, step.model)
    flops = throughput.count_flops(architecture, used, full=config.trainable == "full")
    needed = flops.step(*(float(sums[name]) for name in ("tokens", "weight", "pairs")))
    peak = peak_flops(config, device)
    return Measured(
        device=device.device_kind,
        tokens_per_s=float(sums["tokens"]) / step_s,
        step_s=step_s,
        flops_per_s=needed / step_s,
        mfu=needed / step_s / peak if peak else None,
        memory_gb=runtime.peak_memory_bytes() / 1e9,
        positions=int(sums["weight"]),
        trained=count,
        loss=float(sums["means"]["loss"]),
    )


def peak_flops(config: Config, device: jax.Device) -> float | None:
    """Return the peak of one device: `runtime.peak_tflops`, else its data sheet's."""
    if config.runtime.peak_tflops > 0:
        return config.runtime.peak_tflops * 1e12
    chip = chips.by_device_kind(device.device_kind)
    return chip.flops if chip else None


def describe(found: Measured, config: Config, name: str) -> str:
    """One line with what was run and how fast it was."""
    data = config.data
    tokens = data.batch_size * data.seq_len
    mfu = "-" if found.mfu is None else f"{found.mfu:.1%}"
    return (
        f"{name}, {data.batch_size} x {data.seq_len} in passes of {data.rows_per_pass},"
        f" {found.positions / tokens:.0%} of the positions trained, "
        f"{config.model.dtype}, {found.device}: {found.tokens_per_s:,.0f} tokens/s, "
        f"{found.step_s:.3f} s a step, {found.flops_per_s / 1e12:.3g} TFLOP/s, "
        f"MFU {mfu}, {found.memory_gb:.2f} GB"
    )


def make_parser(about: str) -> argparse.ArgumentParser:
    """The flags that choose a step on random rows; `about` is the script's text."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="configs/finetune_dolly.py", help="file in configs/")
    add("--preset", default="", help="a shape in place of the config's own model")
    add("--rows", type=int, default=4, help="rows of an optimizer step")
    add("--micro", type=int, default=0, help="rows of a forward pass; 0: all")
    add("--seq", type=int, default=256, help="tokens of a row")
    add("--trained", type=float, default=1.0, help="share of positions with a loss")
    add("--documents", type=int, default=1, help="of each row, equally long")
    add("--steps", type=int, default=5, help="that count")
    add("--warmup", type=int, default=2, help="steps that do not count")
    add_knobs(parser)
    return parser


def read_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, Config, Architecture]:
    """The values of the flags, and the config and the shape that they choose.

    Raises:
      UserError: a value does not fit.
    """
    arguments = parser.parse_args(argv)
    if min(arguments.steps, arguments.warmup, arguments.documents) < 1:
        raise UserError("--steps, --warmup and --documents must be at least 1")
    if not 0 < arguments.trained <= 1:
        raise UserError(f"--trained={arguments.trained} is no share above 0, up to 1")
    changes = {
        "data.batch_size": arguments.rows,
        "data.microbatch_size": arguments.micro,
        "data.seq_len": arguments.seq,
        **knobs_of(arguments.knob),
    }
    config = read_config(arguments.config, changes)
    shape = abstract_step.find_architecture(config, arguments.preset)
    return arguments, config, shape


def name_of(arguments: argparse.Namespace) -> str:
    """The config's name, and the preset's if there is one."""
    return " ".join(filter(None, (Path(arguments.config).stem, arguments.preset)))


def add_knobs(parser: argparse.ArgumentParser) -> None:
    """Adds `--knob=PATH=VALUE`, whose values are for `knobs_of`."""
    parser.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="any other knob of the config, as model.remat=full; may be repeated",
    )


def knobs_of(given: Sequence[str]) -> dict[str, Any]:
    """Values of knobs by path, from `PATH=VALUE` each."""
    pairs = (pair.partition("=") for pair in given)
    return {path: _value_of(text) for path, _, text in pairs}


def _value_of(text: str) -> Any:
    """A number, a bool or a tuple where `text` spells one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(argv: Sequence[str]) -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print the numbers for a program"
    )
    arguments, config, shape = read_flags(parser, argv[1:])
    runtime.start(config.runtime)
    found = measure(
        config,
        shape,
        trained=arguments.trained,
        documents=arguments.documents,
        steps=arguments.steps,
        warmup=arguments.warmup,
    )
    as_json = json.dumps(dataclasses.asdict(found))
    text = as_json if arguments.json else describe(found, config, name_of(arguments))
    print(text, flush=True)


if __name__ == "__main__":
    command_line.run(main)
