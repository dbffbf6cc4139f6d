"""The trials of `accelerator.py`, the most valuable first.

A trial is one process with a time limit. `MAIN` takes less than 7 minutes on an H100;
`SPARE` runs where time is left, or where `--only` names it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Trial:
    """One measurement.

    Attributes:
      name: what `--only` takes.
      script: beside this file.
      settings: of the script, as JSON for ours and as flags for PEFT.
      needs: seconds that it is expected to take on an H100.
      limit: seconds after which it is stopped, see also `seconds_for`.
      compiler: names of `launch` settings beside the default ones.
      flags: further XLA_FLAGS.
      halved: name of the setting that is halved, down to 1, where memory ran out.
      spare: it gets only the time that the others leave.
    """

    name: str
    script: str
    settings: Mapping[str, Any]
    needs: float
    limit: float
    compiler: tuple[str, ...] = ()
    flags: str = ""
    halved: str = ""
    spare: bool = False

    def sizes(self) -> Iterator["Trial"]:
        """This trial, and then the smaller ones."""
        trial = self
        yield trial
        while (size := trial.settings.get(self.halved, 1)) > 1:
            settings = {**trial.settings, self.halved: size // 2}
            trial = dataclasses.replace(trial, settings=settings)
            yield trial

    def seconds_for(self, left: float, later: Sequence["Trial"]) -> float:
        """After how many seconds it is stopped, of those that are left.

        It cannot take the time that later trials need, but always gets its own.
        """
        kept = sum(trial.needs for trial in later if not trial.spare)
        return min(self.limit, left, max(self.needs, left - kept))


def card(name: str, measure: str, needs: float, limit: float, **others: Any) -> Trial:
    """A measurement of `card_measures.py`."""
    fields = {f.name for f in dataclasses.fields(Trial)}
    of_trial = {k: v for k, v in others.items() if k in fields}
    settings = {k: v for k, v in others.items() if k not in fields}
    return Trial(
        name, "card_measures.py", {"measure": measure, **settings}, needs, limit,
        **of_trial,
    )  # fmt: skip


def step(name: str, needs: float, limit: float, **others: Any) -> Trial:
    """A training step of `card_measures.py`."""
    return card(name, "step", needs, limit, halved="micro", **others)


def peft(name: str, needs: float, limit: float, **others: Any) -> Trial:
    """A measurement of `peft_side.py`."""
    settings = {**PEFT, **others}
    return Trial(name, "peft_side.py", settings, needs, limit, halved="micro")


DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"
SCANNED = {"trainable": "full", "preset": "llama-1b", "rows": 32, "micro": 8}
# All 16 layers: a scan's copies into its buffers were a tenth of the step of an H100.
PRETRAIN = {**SCANNED, "scan_unroll": 16}
LORA = {"trainable": "lora", "preset": "llama3.1-8b", "rows": 8, "micro": 4}
PEFT = {"shape": "llama3.1-8b", "rows": 8, "micro": 2, "seq": 2048, "rank": 16,
        "steps": 3, "warmup": 1, "adapters": "float32"}  # fmt: skip

MAIN = (
    card("device", "device", 20, 60),
    step("pretrain", 45, 150, **PRETRAIN, profile=True),
    step("lora", 40, 150, **LORA),
    peft("peft", 35, 120),
    card("kernels", "kernels", 75, 130),
    step("lora-nf4", 40, 100, **LORA, quantize="nf4"),
    step("lora-int8", 35, 100, **LORA, quantize="int8"),
    card("decode", "decode", 50, 110),
    card("resume", "resume", 45, 100),
)
SPARE = (
    peft("peft-nf4", 40, 120, quantize="nf4"),
    peft("peft-int8", 40, 120, quantize="int8"),
    peft("peft-bfloat16", 45, 120, adapters="bfloat16"),
    step("pretrain-dots", 50, 150, **PRETRAIN, remat="dots"),
    step("lora-dots", 60, 120, **{**LORA, "micro": 8}, remat="dots", profile=True),
    Trial("train", "card_run.py", {}, 80, 150),
    step("lora-unrolled", 70, 150, **LORA, scan_unroll=4),
    step("pretrain-scanned", 35, 120, **SCANNED, profile=True),
    step("pretrain-cublas", 40, 120, **PRETRAIN, compiler=("gpu-cublas",)),
    # At the size of `pretrain` the flag ran out of an H100's memory.
    step("pretrain-deterministic", 35, 120, **{**SCANNED, "micro": 4},
         flags=DETERMINISTIC),
    peft("peft-checkpointing", 45, 120, micro=8, recompute=True),
)  # fmt: skip
TRIALS = (*MAIN, *(dataclasses.replace(trial, spare=True) for trial in SPARE))
# Compiling a step takes a CPU seconds, even a tiny one: these are run, and all others
# are traced, which finds what is wrong with their settings.
RUN_WHEN_TINY = ("pretrain-scanned",)
SMALL = {
    "device": {"size": 64, "copied": 4096, "times": 2},
    "kernels": {"tokens": (2, 32), "scale": 8, "decoding": (2, 128), "times": 1,
                "only": ["xla", "cudnn", "cudnn_mask", "splash"],
                "cases": ["gemma2, a window and capped scores",
                          "gpt-oss, a window and sinks"]},
    "step": {"preset": "tiny", "rows": 4, "micro": 2, "seq": 32, "rank": 2, "steps": 1,
             "warmup": 0},
    "decode": {"preset": "tiny", "prompt": 8, "new": 4, "batches": [2]},
    # The flag of the other case is that of `pretrain-deterministic`.
    "resume": {"preset": "tiny", "rows": 4, "seq": 32, "steps": 2,
               "cases": ["no flag"]},
    "peft_side.py": {"shape": "tiny", "rows": 4, "micro": 2, "seq": 32, "rank": 2,
                     "steps": 1, "device": "cpu"},
    "card_run.py": {"preset": "tiny", "seq": 64},
}  # fmt: skip


def tiny(trial: Trial) -> Trial:
    """The same measurement with sizes for a CPU, which may be slow."""
    measure = trial.settings.get("measure", trial.script)
    settings = {**trial.settings, **SMALL[measure]}
    if measure == "step" and trial.name not in RUN_WHEN_TINY:
        settings |= {"run": False}
    return dataclasses.replace(trial, settings=settings, needs=0, limit=900, halved="")


def changed(text: str) -> Trial:
    """A trial with other settings, from `NAME:JSON`.

    Raises:
      UserError: there is no such trial, or the rest is no JSON object.
    """
    name, _, changes = text.partition(":")
    by_name = {trial.name: trial for trial in TRIALS}
    try:
        given = json.loads(changes)
        trial = by_name[name]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"--also={text}: NAME:JSON, with one of {', '.join(by_name)} and an object "
            'of settings, as pretrain:{"micro": 16, "compiler": ["gpu-cublas"]}'
        ) from error
    of_trial = {
        "compiler": tuple(given.pop("compiler", trial.compiler)),
        "flags": given.pop("flags", trial.flags),
    }
    settings = {**trial.settings, **given}
    return dataclasses.replace(trial, settings=settings, **of_trial)
