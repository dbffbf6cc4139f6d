"""One GPU or TPU measured: kernels, MFU, LoRA and QLoRA against PEFT, decoding, resume.

    python tests/bench/accelerator.py --out=card.jsonl --torch-python=python3

Each measurement is a process of its own with a time limit, the most valuable first: see
`card_trials.py`. A trial that does not fit into `--budget` is reported as not run.
Every result is one JSON line, printed and appended to `--out` when it is known; a
failure keeps the results so far and the end of standard error. `took_s` are seconds
from the start of a trial to its line. `--tiny` runs everything on a CPU with tiny
sizes.

Our side needs jax, flax, optax and numpy; `train` needs all of requirements.txt, and
the PEFT side torch, transformers and peft in `--torch-python`, for codes bitsandbytes
too. Settings of the compiler are those that `launch` sets by default, see
launch/jobs/compiler_settings.toml.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import os
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

import card_children
from card_trials import TRIALS, Trial, changed, tiny

from launch.jobs import compiler_settings
from research.core.errors import UserError
from research.models.families.family_registry import to_hf_config
from research.models.presets import preset
from research.parallel import chips

BENCH = Path(__file__).resolve().parent
Result = dict[str, Any]
MFU_GOAL, LORA_GOAL = 0.5, 1.5
# Shown in the JSON lines alone.
QUIET = {"trial", "settings", "compiler", "flags", "stderr", "seconds", "versions"}
# Modules without which `research.train` does not start.
TRAIN_NEEDS = ("absl", "grain", "ml_collections", "orbax", "tensorboardX", "tokenizers")
PEFT_NEEDS = ("torch", "transformers", "peft")


def start(trial: Trial, chip: str, torch_python: str, folder: Path):
    """The child of a trial, running."""
    settings, variables = dict(trial.settings), environment(trial, chip, folder)
    if trial.script == "card_measures.py":
        return card_children.measurement(settings.pop("measure"), settings, variables)
    script = str(BENCH / trial.script)
    if trial.script == "card_run.py":
        settings["folder"] = str(folder / "runs")
        return card_children.Child(
            [sys.executable, script, json.dumps(settings)], variables
        )
    file = folder / f"{settings['shape']}.json"
    file.write_text(json.dumps(to_hf_config(preset(settings["shape"]))))
    arguments = peft_arguments(settings | {"shape": file})
    return card_children.Child([torch_python, script, *arguments], variables)


def peft_arguments(settings: Mapping[str, Any]) -> list[str]:
    """The flags of `peft_side.py`."""
    return [
        f"--{'' if value else 'no-'}{name}"
        if isinstance(value, bool)
        else f"--{name}={value}"
        for name, value in settings.items()
    ]


def environment(trial: Trial, chip: str, folder: Path) -> dict[str, str]:
    """The variables of a child: what `launch` sets by default, and the trial's own."""
    if trial.script == "peft_side.py":
        # Its best case: otherwise pieces of free memory that no tensor fits are lost.
        return {"PYTORCH_ALLOC_CONF": "expandable_segments:True", **os.environ}
    added = compiler_settings.environment(chip, ("default", *trial.compiler))
    own = added.get("XLA_FLAGS", os.environ.get("XLA_FLAGS"))
    flags = " ".join(filter(None, (own, trial.flags)))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    return {**cache, **os.environ, **added, **({"XLA_FLAGS": flags} if flags else {})}


@functools.cache
def absent(python: str, modules: tuple[str, ...]) -> list[str]:
    """Those of the modules that an interpreter does not have.

    Raises:
      UserError: it does not start.
    """
    if python == sys.executable:
        return [name for name in modules if importlib.util.find_spec(name) is None]
    program = (
        "import importlib.util as util, sys; "
        "print(*(name for name in sys.argv[1:] if util.find_spec(name) is None))"
    )
    argv = [python, "-c", program, *modules]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"--torch-python={python}: it does not start ({error}); name an "
            "interpreter that has torch, transformers and peft, or leave the flag out "
            "to measure this side alone"
        ) from error
    return done.stdout.split()


def lacking(trial: Trial, torch_python: str) -> str:
    """Why a trial cannot run here; empty where it can."""
    python, needs = sys.executable, ()
    if trial.script == "card_run.py":
        needs = TRAIN_NEEDS
    elif trial.script == "peft_side.py":
        python, needs = torch_python, PEFT_NEEDS
        needs += ("bitsandbytes",) if "quantize" in trial.settings else ()
        if not python:
            return f"needs --torch-python with {', '.join(needs)}"
    missing = absent(python, needs) if needs else []
    return f"needs {', '.join(missing)} in {python}" if missing else ""


def measure(
    trials: Sequence[Trial], budget: float, torch_python: str, folder: Path
) -> Iterator[Result]:
    """Runs each trial, and yields its results as they come."""
    over = time.monotonic() + budget
    chip = ""
    for at, trial in enumerate(trials):
        for sized in trial.sizes():
            about = {"trial": sized.name, "settings": sized.settings}
            about |= {"compiler": sized.compiler} if sized.compiler else {}
            about |= {"flags": sized.flags} if sized.flags else {}
            left = over - time.monotonic()
            reason = lacking(sized, torch_python)
            if not reason and (left <= 0 or left < sized.needs):
                reason = f"{left:.0f} s left, and it takes about {sized.needs:.0f} s"
            if reason:
                yield {**about, "not_run": reason}
                break
            begun = time.monotonic()
            child = start(sized, chip, torch_python, folder)
            limit = sized.seconds_for(left, trials[at + 1 :])
            with contextlib.closing(child.results(limit)) as results:
                for result in results:
                    if "kind" in result:
                        found = chips.by_device_kind(result["kind"])
                        chip = found.name if found else ""
                    took = {"took_s": round(time.monotonic() - begun, 1)}
                    yield {**about, **took, **result}
            if not child.failure:
                break
            took = {"took_s": round(time.monotonic() - begun, 1)}
            yield {**about, **took, **child.failure}
            if child.failure["failed"] != "out of memory":
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
        yield (
            f"best MFU {best['mfu']:.1%} of {best['peak']} ({best['trial']}; goal "
            f"{MFU_GOAL:.0%})"
        )
    for form in ("bfloat16", "nf4", "int8"):
        yield from against_peft(results, form)
    yield from against_bfloat16(results)


def steps_of(results: Sequence[Result], side: str, form: str) -> list[Result]:
    """LoRA steps over a base of this form, "lora" for ours or "peft"."""
    return [
        r
        for r in results
        if r["trial"].startswith(side)
        and "tokens_per_s" in r
        and r.get("settings", {}).get("quantize", "bfloat16") == form
    ]


def against_peft(results: Sequence[Result], form: str) -> Iterator[str]:
    """The fastest LoRA step of both sides."""
    sides = [steps_of(results, side, form) for side in ("lora", "peft")]
    if not all(sides):
        return
    ours, theirs = (max(x, key=lambda r: r["tokens_per_s"]) for x in sides)
    odd = [n for n in ("trained", "positions") if ours[n] != theirs[n]]
    ratio = ours["tokens_per_s"] / theirs["tokens_per_s"]
    goal = f"; goal {LORA_GOAL}" if form == "bfloat16" else ""
    yield (
        f"LoRA over {form}: {ratio:.2f} times PEFT ({ours['trial']} "
        f"{ours['tokens_per_s']:,.0f} tokens/s, {theirs['trial']} "
        f"{theirs['tokens_per_s']:,.0f}{goal}); attention {ours['attention']} and "
        f"{theirs['attention']}" + (f"; NOT EQUAL in {', '.join(odd)}" if odd else "")
    )


def against_bfloat16(results: Sequence[Result]) -> Iterator[str]:
    """Each base in codes with the same step over a base in bfloat16."""
    for form in ("nf4", "int8"):
        for coded in steps_of(results, "lora", form):
            same = {k: v for k, v in coded["settings"].items() if k != "quantize"}
            for plain in steps_of(results, "lora", "bfloat16"):
                if plain["settings"] == same:
                    share = {
                        name: coded[name] / plain[name]
                        for name in ("tokens_per_s", "step_gb", "frozen_gb")
                    }
                    yield (
                        f"base in {form}: {share['tokens_per_s']:.2f} of bfloat16's "
                        f"speed, {share['step_gb']:.2f} of the step's memory, "
                        f"{share['frozen_gb']:.2f} of the frozen weights'"
                    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = ", ".join(trial.name for trial in TRIALS)
    add("--budget", type=float, default=420.0, help="seconds of the whole")
    add("--out", type=Path, help="file to which every result is appended")
    add("--torch-python", default="", help="interpreter that has PEFT")
    add("--only", default="", help=f"with commas, of {names}; device always runs")
    add(
        "--also",
        action="append",
        default=[],
        metavar="NAME:JSON",
        help='a trial once more with other settings; "compiler" names settings of '
        'launch, "flags" are further XLA_FLAGS; may be repeated',
    )
    add("--tiny", action="store_true", help="sizes for a CPU")
    add(
        "--forks",
        action="store_true",
        help="import JAX once, and fork for each measurement: saves its seconds",
    )
    return parser.parse_args(argv)


def choose(arguments: argparse.Namespace) -> list[Trial]:
    """The trials that were asked for.

    `device` is always one of them: the compiler's settings depend on the chip.

    Raises:
      UserError: a name or settings are wrong, or nothing could run or be written.
    """
    asked = {name for name in arguments.only.split(",") if name}
    if unknown := asked - {trial.name for trial in TRIALS}:
        raise UserError(f"--only: no trial {', '.join(sorted(unknown))}; see --help")
    chosen = [t for t in TRIALS if not asked or t.name in {"device", *asked}]
    chosen += [changed(text) for text in arguments.also]
    # A mistake that is found later costs minutes of the device.
    if arguments.torch_python:
        absent(arguments.torch_python, PEFT_NEEDS)
    if arguments.out:
        try:
            arguments.out.open("a").close()
        except OSError as error:
            raise UserError(f"--out={arguments.out}: {error.strerror}") from error
    return [tiny(trial) for trial in chosen] if arguments.tiny else chosen


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    chosen = choose(arguments)
    # Ends as an error does: what runs is stopped, and frees the device.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments.forks:
        import card_measures  # noqa: F401

        card_children.share_imports()
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{now}: python {shlex.join(sys.argv)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(chosen, arguments.budget, arguments.torch_python, Path(folder))
        with contextlib.closing(found):
            results = list(recorded(found, arguments))
    print("\n".join(["", *summary(results)]), flush=True)
    bad = [r for r in results if "failed" in r or r.get("right") is False]
    return int(bool(bad))


def recorded(
    results: Iterator[Result], arguments: argparse.Namespace
) -> Iterator[Result]:
    """Writes each result when it comes.

    Raises:
      UserError: JAX has no accelerator here, and the sizes are those of one.
    """
    for result in results:
        line = json.dumps(result)
        print(line, flush=True)
        if arguments.out:
            with arguments.out.open("a") as file:
                file.write(line + "\n")
        if result.get("platform") == "cpu" and not arguments.tiny:
            raise UserError(
                f"JAX in {sys.executable} finds no GPU and no TPU; install "
                "jax[cuda13] or jax[tpu] there, or take sizes for a CPU with --tiny"
            )
        yield result


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
