"""One GPU or TPU measured: kernels, MFU, LoRA against PEFT, decoding, exact resume.

    python tests/bench/accelerator.py --out=card.jsonl --torch-python=python3

Each measurement is a process of its own with a time limit, the most valuable first.
A trial that does not fit into `--budget` is reported as not run. Every result is one
JSON line, printed and appended to `--out`; a failure keeps the results so far and the
end of standard error. `--tiny` runs everything on a CPU with tiny sizes.

Our side needs jax, flax, optax and numpy; `train` needs all of requirements.txt, and
the PEFT side torch, transformers and peft in `--torch-python`. Settings of the compiler
are those that `launch` sets by default, see launch/jobs/compiler_settings.toml.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch.jobs import compiler_settings
from research.core.errors import UserError
from research.models.families.family_registry import to_hf_config
from research.models.presets import preset
from research.parallel import chips

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parents[1]
Result = dict[str, Any]
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", re.IGNORECASE)
NOISE = re.compile(r"^[WI]\d{4} |^\s*$")
MFU_GOAL, LORA_GOAL = 0.5, 1.5
TAIL = 40
# Shown in the JSON lines alone.
QUIET = {"trial", "settings", "compiler", "flags", "stderr", "seconds", "versions"}
# Modules without which `research.train` does not start.
TRAIN_NEEDS = ("absl", "grain", "ml_collections", "orbax", "tensorboardX", "tokenizers")


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


PRETRAIN = {"trainable": "full", "preset": "llama-1b", "rows": 32, "micro": 8}
LORA = {"trainable": "lora", "preset": "llama3.1-8b", "rows": 8, "micro": 4}
PEFT = {"shape": "llama3.1-8b", "rows": 8, "micro": 2, "seq": 2048, "rank": 16,
        "steps": 3, "warmup": 1, "adapters": "float32"}  # fmt: skip

# The first guesses of everything, then what may be better.
TRIALS = (
    card("device", "device", 25, 90),
    card("pretrain", "step", 35, 200, **PRETRAIN, profile=True, smaller={"micro": 4}),
    card("lora", "step", 40, 200, **LORA, smaller={"micro": 2}),
    Trial("peft", "peft_side.py", PEFT, 35, 150, smaller={"micro": 1}),
    card("kernels", "kernels", 80, 120),
    card("pretrain-cublas", "step", 25, 120, **PRETRAIN, compiler=("gpu-cublas",),
         smaller={"micro": 4}),
    card("resume", "resume", 50, 120),
    card("decode", "decode", 50, 110),
    Trial("peft-bfloat16", "peft_side.py", {**PEFT, "adapters": "bfloat16"}, 45, 120,
          smaller={"micro": 1}),
    Trial("train", "card_run.py", {}, 80, 150),
    card("pretrain-dots", "step", 55, 120, **{**PRETRAIN, "micro": 16}, remat="dots",
         smaller={"micro": 8}),
    card("lora-dots", "step", 60, 120, **{**LORA, "micro": 8}, remat="dots",
         profile=True, smaller={"micro": 4}),
    card("pretrain-chunk1024", "step", 55, 120, **PRETRAIN, loss_chunk=1024),
    # Open questions of the first measurement of an H100: docs/measured.md.
    card("kernels-cudnn", "kernels", 20, 60, shapes=[[32, 8, 64]], documents=[3, 12],
         only=["cudnn", "cudnn_mask"]),
    card("pretrain-slices", "step", 30, 100, **PRETRAIN, profile=True,
         flags="--xla_gpu_enable_dynamic_slice_fusion=true"),
    card("resume-deterministic", "resume", 30, 90,
         cases=["exclude_nondeterministic_ops"]),
    card("pretrain-deterministic", "step", 25, 100, **PRETRAIN,
         flags="--xla_gpu_exclude_nondeterministic_ops=true"),
    card("lora-slices", "step", 35, 100, **LORA,
         flags="--xla_gpu_enable_dynamic_slice_fusion=true"),
    card("pretrain-mask", "step", 25, 90, **PRETRAIN, attention="cudnn_mask"),
    card("pretrain-chunk128", "step", 25, 100, **PRETRAIN, loss_chunk=128),
    card("pretrain-unrolled", "step", 40, 150, **PRETRAIN, scan_unroll=16),
    Trial("peft-checkpointing", "peft_side.py",
          {**PEFT, "micro": 8, "recompute": True}, 45, 120),
)  # fmt: skip
SMALL = {
    "device": {"size": 64, "copied": 4096, "times": 2},
    "kernels": {"shapes": [[4, 2, 16]], "rows": 2, "seq": 32, "times": 1},
    "step": {"preset": "tiny", "rows": 4, "micro": 2, "seq": 32, "rank": 2, "steps": 1,
             "attention": "auto"},
    "decode": {"preset": "tiny", "prompt": 8, "new": 4, "batches": [1, 2]},
    "resume": {"preset": "tiny", "rows": 4, "seq": 32, "steps": 2,
               "cases": ["no flag"]},
    "peft_side.py": {"shape": "tiny", "rows": 4, "micro": 2, "seq": 32, "rank": 2,
                     "steps": 1, "device": "cpu"},
    "card_run.py": {"preset": "tiny", "seq": 64},
}  # fmt: skip


def tiny(trial: Trial) -> Trial:
    """The same measurement with sizes for a CPU, which may be slow."""
    settings = {**trial.settings, **SMALL[trial.settings.get("measure", trial.script)]}
    return dataclasses.replace(
        trial, settings=settings, needs=0, limit=900, compiler=(), smaller=None
    )


def command(trial: Trial, torch_python: str, folder: Path) -> list[str]:
    """The child's command line."""
    settings = dict(trial.settings)
    if trial.script == "card_measures.py":
        measure = settings.pop("measure")
        arguments = [measure, json.dumps(settings)]
    elif trial.script == "card_run.py":
        arguments = [json.dumps({"folder": str(folder / "runs"), **settings})]
    else:
        shape = settings.pop("shape")
        file = folder / f"{shape}.json"
        file.write_text(json.dumps(to_hf_config(preset(shape))))
        recompute = settings.pop("recompute", False)
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        arguments += [f"--shape={file}", f"--{'' if recompute else 'no-'}recompute"]
    python = torch_python if trial.script == "peft_side.py" else sys.executable
    return [python, str(BENCH / trial.script), *arguments]


def environment(trial: Trial, chip: str, folder: Path) -> dict[str, str]:
    """The variables of a child: what `launch` sets by default, and the trial's own."""
    if trial.script == "peft_side.py":
        # Its best case: otherwise pieces of free memory that no tensor fits are lost.
        return {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    added = compiler_settings.environment(chip, ("default", *trial.compiler))
    flags = " ".join(filter(None, (added.get("XLA_FLAGS"), trial.flags)))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    return {**cache, **os.environ, **added, **({"XLA_FLAGS": flags} if flags else {})}


def lacking(trial: Trial, torch_python: str) -> str:
    """Why a trial cannot run here; empty where it can."""
    if trial.script == "peft_side.py" and not torch_python:
        return "needs --torch-python with torch, transformers and peft"
    if trial.script == "card_run.py":
        absent = [m for m in TRAIN_NEEDS if importlib.util.find_spec(m) is None]
        if absent:
            return f"needs {', '.join(absent)}"
    return ""


def run(argv: Sequence[str], variables: Mapping[str, str], limit: float) -> Result:
    """`results` of a child, and `failed` with `stderr` where it has not ended well."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            argv, cwd=ROOT, env=variables, stdout=out, stderr=err,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(limit)
            failure = "" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit:.3g} s"
        finally:
            # Its own children, too: they would hold the card's memory.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for stream in (out, err):
            stream.seek(0)
        results = [json.loads(x) for x in out.read().splitlines() if x[:1] == "{"]
        lines = [x for x in err.read().splitlines() if not NOISE.match(x)]
    if not failure:
        return {"results": results}
    # The kernel kills with signal 9 what takes too much of the host's memory.
    if failure == "exit code -9" or NO_MEMORY.search("\n".join(lines)):
        failure = "out of memory"
    return {"results": results, "failed": failure, "stderr": lines[-TAIL:]}


def measure(
    trials: Sequence[Trial], budget: float, torch_python: str, folder: Path
) -> Iterator[Result]:
    """Runs each trial, and yields its results as they come."""
    over = time.monotonic() + budget
    chip = ""
    for trial in trials:
        sizes = [trial.settings]
        sizes += [{**trial.settings, **trial.smaller}] if trial.smaller else []
        for settings in sizes:
            sized = dataclasses.replace(trial, settings=settings)
            about = {"trial": trial.name, "settings": settings}
            about |= {"compiler": trial.compiler} if trial.compiler else {}
            about |= {"flags": trial.flags} if trial.flags else {}
            left = over - time.monotonic()
            reason = lacking(trial, torch_python)
            if not reason and (left <= 0 or left < trial.needs):
                reason = f"{left:.0f} s left, and it takes about {trial.needs:.0f} s"
            if reason:
                yield {**about, "not_run": reason}
                break
            begun = time.monotonic()
            done = run(
                command(sized, torch_python, folder),
                environment(sized, chip, folder),
                min(trial.limit, left),
            )
            took = {"took_s": round(time.monotonic() - begun, 1)}
            for result in done.pop("results"):
                if "kind" in result:
                    found = chips.by_device_kind(result["kind"])
                    chip = found.name if found else ""
                yield {**about, **took, **result}
            if not done:
                break
            yield {**about, **took, **done}
            if done["failed"] != "out of memory":
                break


def summary(results: Sequence[Result]) -> Iterator[str]:
    """The lines that a person reads: one for each result, then goals."""
    for result in results:
        if "operations" in result:
            yield f"{result['trial']}: longest operations of a step, ms and calls"
            yield from (f"{ms:9.2f} {n:6} {op}" for op, ms, n in result["operations"])
            continue
        words = " ".join(
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in result.items()
            if name not in QUIET
        )
        yield f"{result['trial']}: {words}"
        yield from (f"    | {line[:200]}" for line in result.get("stderr", [])[-12:])
    full = [r for r in results if r["trial"].startswith("pretrain") and r.get("mfu")]
    if full:
        best = max(full, key=lambda r: r["mfu"])
        yield f"best MFU {best['mfu']:.1%} ({best['trial']}; goal {MFU_GOAL:.0%})"
    sides = [
        [r for r in results if r["trial"].startswith(side) and "tokens_per_s" in r]
        for side in ("lora", "peft")
    ]
    if all(sides):
        ours, theirs = (max(x, key=lambda r: r["tokens_per_s"]) for x in sides)
        odd = [n for n in ("trained", "positions") if ours[n] != theirs[n]]
        ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
        yield (
            f"LoRA: {ratio:.2f} times PEFT ({ours['trial']} {ours['tokens_per_s']:,.0f}"
            f" tokens/s, {theirs['trial']} {theirs['tokens_per_s']:,.0f}; goal "
            f"{LORA_GOAL})" + (f"; NOT EQUAL in {', '.join(odd)}" if odd else "")
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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(trial.name for trial in TRIALS)
    add("--budget", type=float, default=420.0, help="seconds of the whole")
    add("--out", type=Path, help="file to which every result is appended")
    add("--torch-python", default="", help="interpreter that has PEFT")
    add("--only", default="", help=f"with commas, of {names}")
    add(
        "--also",
        action="append",
        default=[],
        metavar="NAME:JSON",
        help='a trial once more with other settings; "compiler" names settings of '
        'launch, "flags" are further XLA_FLAGS; may be repeated',
    )
    add("--tiny", action="store_true", help="sizes for a CPU")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    asked = [name for name in arguments.only.split(",") if name]
    if unknown := {*asked} - {trial.name for trial in TRIALS}:
        raise UserError(f"--only: no trial {', '.join(sorted(unknown))}; see --help")
    chosen = [trial for trial in TRIALS if not asked or trial.name in asked]
    chosen += [changed(text) for text in arguments.also]
    if arguments.tiny:
        chosen = [tiny(trial) for trial in chosen]
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{now}: python {shlex.join(sys.argv)}", flush=True)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for result in measure(
            chosen, arguments.budget, arguments.torch_python, Path(folder)
        ):
            results.append(result)
            line = json.dumps(result)
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(line + "\n")
    print("\n".join(["", *summary(results)]), flush=True)
    bad = [r for r in results if "failed" in r or r.get("right") is False]
    return int(bool(bad))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
