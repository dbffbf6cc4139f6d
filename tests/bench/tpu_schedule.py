"""Compile large programs for TPU slices, and print what their schedules wait for.

    PYTHONPATH=.venv-tpu .venv/bin/python tests/bench/tpu_schedule.py --only="decode 8B"

Needs libtpu and no TPU (`make plan-check` installs it into `.venv-tpu`). A program has
4 layers, since the others repeat them; one compiles in 15 s to some minutes. Bytes are
those of whole arrays, as `research.plan` counts them, per call: a training step, a
chunk of a prompt, or one round of decoding. A collective is hidden if a product, a
kernel or a loop runs between its start and its end, and bare if the chip waits for it.
`--settings` compiles with settings of `python -m launch`, for programs of one chip.
"""

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from launch.jobs import compiler_settings
from research.core.errors import UserError
from research.plan.compiled.libtpu_environment import ENVIRONMENT

LAYERS = 4
MIB = 2**20


def measure(program: Any, layers: int) -> dict[str, Any]:
    """Compiles one of `tpu_programs.PROGRAMS`, and reads its schedule."""
    from research.models.transformer import Model
    from research.parallel import mesh as meshes
    from research.plan.compiled import hlo_text
    from research.plan.compiled.schedule import read_schedule

    begun = time.monotonic()
    lowered, mesh = program.lower(layers)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    specs = Model(program.architecture(layers)).specs
    where = meshes.shardings(specs, mesh)
    weights = [spec.shape for spec in specs.values() if len(spec.shape) > 1]
    weights += [
        where[path].shard_shape(spec.shape)
        for path, spec in specs.items()
        if len(spec.shape) > 1
    ]
    found = read_schedule(hlo_text.parse(compiled.as_text()), mesh, weights)
    rows: dict[tuple[str, str], collections.Counter] = {}
    for name in ("hidden", "bare"):
        for each in getattr(found, name):
            row = rows.setdefault((each.kind, each.label), collections.Counter())
            row[f"{name}_count"] += each.times
            row[f"{name}_mib"] += each.nbytes * each.times / MIB
    copies: collections.Counter = collections.Counter()
    for copy in found.copies:
        copies[copy.shape] += copy.nbytes * copy.times / MIB
    return {
        "program": program.name,
        "gib_a_chip": needed / 2**30,
        "seconds": time.monotonic() - begun,
        "collectives": [
            {"kind": kind, "axes": axes, **row} for (kind, axes), row in rows.items()
        ],
        "copies_mib": dict(copies),
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['program']}: {result['gib_a_chip']:.2f} GiB a chip, compiled in "
        f"{result['seconds']:.0f} s"
    )
    rows = result["collectives"]
    for row in sorted(rows, key=lambda row: -row.get("bare_mib", 0)):
        hidden, bare = (
            f"{row.get(f'{name}_count', 0):5.0f} {row.get(f'{name}_mib', 0):8,.1f} MiB"
            for name in ("hidden", "bare")
        )
        what = f"{row['kind']} {row['axes']}"
        print(f"  {what:36} hidden {hidden}   bare {bare}")
    for shape, mib in result["copies_mib"].items():
        print(f"  copies of weights {shape}: {mib:,.1f} MiB")


def _set(settings: str, chips: set[str]) -> None:
    """Sets the environment of `settings` before libtpu reads it.

    Raises:
      SystemExit: there is no such setting, or it is not for the one chip.
    """
    if settings != "none" and len(chips) > 1:
        raise SystemExit(f"--settings needs an --only of one chip, not {sorted(chips)}")
    try:
        found = compiler_settings.environment(chips.pop(), settings.split(","))
    except UserError as error:
        raise SystemExit(str(error)) from error
    os.environ |= found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="programs with this in their name")
    parser.add_argument("--list", action="store_true", help="names of all programs")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--settings", default="none", help="as of python -m launch")
    parser.add_argument("--out", help="also write a JSON line for each program")
    flags = parser.parse_args()
    os.environ |= ENVIRONMENT
    from tpu_programs import PROGRAMS

    chosen = [program for program in PROGRAMS if flags.only in program.name]
    if not chosen:
        raise SystemExit(f"--only={flags.only!r} is in no name; --list prints them all")
    _set(flags.settings, {program.topology.partition(":")[0] for program in chosen})
    for program in chosen:
        if flags.list:
            print(program.name)
            continue
        try:
            result = measure(program, flags.layers)
        except UserError as error:
            raise SystemExit(str(error)) from error
        result["settings"] = flags.settings
        show(result)
        sys.stdout.flush()
        if flags.out:
            with open(flags.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
