"""The trials of `accelerator.py`, the most valuable first.

A trial is one process with a time limit. Those up to `resume` take 7 minutes on an
H100; the others run where time is left, or where `--only` names them.
"""

import dataclasses
import json
from collections.abc import Mapping
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
      limit: seconds after which it is stopped.
      compiler: names of `launch` settings beside the default ones.
      flags: further XLA_FLAGS.
      smaller: settings to try once more where memory ran out.
    """

    name: str
    script: str
    settings: Mapping[str, Any]
    needs: float
    limit: float
    compiler: tuple[str, ...] = ()
    flags: str = ""
    smaller: Mapping[str, Any] | None = None


def card(name: str, measure: str, needs: float, limit: float, **others: Any) -> Trial:
    """A measurement of `card_measures.py`."""
    fields = {f.name for f in dataclasses.fields(Trial)}
    of_trial = {k: v for k, v in others.items() if k in fields}
    settings = {k: v for k, v in others.items() if k not in fields}
    return Trial(
        name, "card_measures.py", {"measure": measure, **settings}, needs, limit,
        **of_trial,
    )  # fmt: skip


def peft(name: str, needs: float, limit: float, **others: Any) -> Trial:
    """A measurement of `peft_side.py`."""
    settings = {**PEFT, **others}
    return Trial(
        name, "peft_side.py", settings, needs, limit,
        smaller={"micro": settings["micro"] // 2},
    )  # fmt: skip


DETERMINISTIC = "--xla_gpu_exclude_nondeterministic_ops=true"
SCANNED = {"trainable": "full", "preset": "llama-1b", "rows": 32, "micro": 8}
# All 16 layers: a scan's copies into its buffers were a tenth of the step of an H100.
PRETRAIN = {**SCANNED, "scan_unroll": 16}
LORA = {"trainable": "lora", "preset": "llama3.1-8b", "rows": 8, "micro": 4}
PEFT = {"shape": "llama3.1-8b", "rows": 8, "micro": 2, "seq": 2048, "rank": 16,
        "steps": 3, "warmup": 1, "adapters": "float32"}  # fmt: skip

TRIALS = (
    card("device", "device", 20, 90),
    card("pretrain", "step", 45, 200, **PRETRAIN, profile=True, smaller={"micro": 4}),
    card("lora", "step", 40, 200, **LORA, smaller={"micro": 2}),
    peft("peft", 35, 150),
    card("kernels", "kernels", 75, 130),
    card("lora-nf4", "step", 40, 120, **LORA, quantize="nf4", smaller={"micro": 2}),
    card("lora-int8", "step", 35, 120, **LORA, quantize="int8", smaller={"micro": 2}),
    card("decode", "decode", 50, 110),
    card("resume", "resume", 45, 120),
    peft("peft-nf4", 40, 120, quantize="nf4"),
    peft("peft-int8", 40, 120, quantize="int8"),
    peft("peft-bfloat16", 45, 120, adapters="bfloat16"),
    card("pretrain-dots", "step", 50, 150, **PRETRAIN, remat="dots",
         smaller={"micro": 4}),
    card("lora-dots", "step", 60, 120, **{**LORA, "micro": 8}, remat="dots",
         profile=True, smaller={"micro": 4}),
    Trial("train", "card_run.py", {}, 80, 150),
    card("lora-unrolled", "step", 70, 150, **LORA, scan_unroll=4,
         smaller={"micro": 2}),
    card("pretrain-scanned", "step", 35, 120, **SCANNED, profile=True,
         smaller={"micro": 4}),
    card("pretrain-cublas", "step", 40, 120, **PRETRAIN, compiler=("gpu-cublas",),
         smaller={"micro": 4}),
    # At the size of `pretrain` the flag ran out of an H100's memory.
    card("pretrain-deterministic", "step", 35, 120, **{**SCANNED, "micro": 4},
         flags=DETERMINISTIC, smaller={"micro": 2}),
    peft("peft-checkpointing", 45, 120, micro=8, recompute=True),
)  # fmt: skip
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
    "resume": {"preset": "tiny", "rows": 4, "seq": 32, "steps": 2},
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
    return dataclasses.replace(
        trial, settings=settings, needs=0, limit=900, smaller=None
    )


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
