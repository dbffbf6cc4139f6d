"""Figures of the compiled hot programs, against the recorded ones.

    python tests/bench/compiled_figures.py              show what has changed
    python tests/bench/compiled_figures.py --record     accept it
    python tests/bench/compiled_figures.py --hlo=DIR    write the programs, to compare

`make test` fails when a figure rises. Nothing is timed: one compiler makes the same
program of the same code on any machine of one architecture, however busy it is. So
the figures are compared exactly, and only for the versions that they were recorded
with.
"""

import argparse
import collections
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    # As in tests/conftest.py. LLVM's effort changes no figure, but the time.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
from compiled_programs import PROGRAMS

from research.plan.compiled import hlo_text

RECORD = Path(__file__).with_suffix(".json")
ACCEPT = "python tests/bench/compiled_figures.py --record"
# Everything that decides which program is made of our code.
PACKAGES = ("jax", "jaxlib", "flax", "optax")
# Instructions that are counted, by the name of their figure.
COUNTED = {
    "fusions": "fusion",
    "copies": "copy",
    "dots": "dot",
    "transposes": "transpose",
    "casts": "convert",
    "loops": "while",
}

Figures = dict[str, int]


def toolchain() -> str:
    """The versions and the architecture that figures belong to."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([*versions, platform.machine()])


def read_figures(compiled: jax.stages.Compiled) -> Figures:
    """The figures of a program; the less of each, the better.

    `flops` and `bytes accessed` are those of XLA's cost analysis, which counts the body
    of a loop once. Instructions count as often as they run, where the compiler knows
    how many rounds a loop has, else once. `temporary bytes` is the memory beside
    arguments and results, `new result bytes` what takes no donated argument's place.
    """
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    count: collections.Counter[str] = collections.Counter()
    program = hlo_text.parse(compiled.as_text())
    for executed in hlo_text.executions(program, unknown_trips=1):
        count[executed.instruction.opcode] += int(executed.times)
    return {
        "flops": int(cost["flops"]),
        "bytes accessed": int(cost["bytes accessed"]),
        "temporary bytes": memory.temp_size_in_bytes,
        "new result bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        **{name: count[opcode] for name, opcode in COUNTED.items()},
    }


def describe(
    program: str, recorded: Mapping[str, int], found: Mapping[str, int]
) -> tuple[list[str], list[str]]:
    """One line for each figure that has risen, and for each that has fallen."""
    lines: tuple[list[str], list[str]] = ([], [])
    for name, after in found.items():
        before = recorded.get(name, 0)
        if after == before:
            continue
        share = f" ({after / before - 1:+.2%})" if before else ""
        verb = "rose" if after > before else "fell"
        line = f"{program}: {name} {verb} from {before:,} to {after:,}{share}"
        lines[after < before].append(line)
    return lines


def recorded_figures() -> dict[str, dict[str, Figures]]:
    """Figures by toolchain and program."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="accept the figures")
    parser.add_argument("--hlo", type=Path, help="folder for the compiled programs")
    arguments = parser.parse_args()
    every = recorded_figures() if RECORD.exists() else {}
    before = every.get(toolchain(), {})
    found: dict[str, Figures] = {}
    for name, lower in PROGRAMS.items():
        compiled = lower().compile()
        found[name] = read_figures(compiled)
        rose, fell = describe(name, before.get(name, {}), found[name])
        same = [] if rose or fell else [f"{name}: as recorded"]
        print(*rose, *fell, *same, sep="\n")
        if arguments.hlo:
            arguments.hlo.mkdir(parents=True, exist_ok=True)
            file = arguments.hlo / f"{name.replace(' ', '_')}.hlo"
            file.write_text(compiled.as_text(), encoding="utf-8")
    if arguments.record:
        every[toolchain()] = found
        text = json.dumps(every, indent=2, sort_keys=True)
        RECORD.write_text(text + "\n", encoding="utf-8")
        print(f"recorded for {toolchain()} in {RECORD}")


if __name__ == "__main__":
    main()
