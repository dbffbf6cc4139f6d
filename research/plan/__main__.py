"""Plans a run before chips are rented: `python -m research.plan --config=FILE.py`."""

import dataclasses
import os
from collections.abc import Sequence

from research.config import command_line
from research.config.knobs import knob
from research.core.errors import UserError
from research.plan.compiled.libtpu_environment import ENVIRONMENT

USAGE = """
python -m research.plan --config=FILE.py [--config.KNOB=VALUE ...]
    [--topology=v5e:4x4] [--slices=2] | [--device=h100:8]

Compiles the real train step for TPUs, even without one in this machine (pip install
libtpu, in an environment of its own) and shows the memory of a chip, the traffic
between chips, the best possible speed and the cost. --device estimates the same by
formula, for any chip, without a compiler. Neither weights nor data are read. Topologies
count chips. The cloud's name v5p-512 counts cores; it is --topology=v5p:4x8x8.
"""


@dataclasses.dataclass(frozen=True)
class PlanFlags:
    topology: str = knob("", "TPU slice; empty: config.runtime.topology")
    slices: int = knob(0, "number of slices; 0: config.runtime.slices", low=0)
    device: str = knob("", "estimate only, for h100:8, v5e:4x4 or cpu")
    search: bool = knob(False, "find the largest micro-batch, layouts and remat")
    json: str = knob("", "file to write the plan into")
    preset: str = knob("", "shape that stands for the config's model")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 fits, 1 does not."""
    config, f = command_line.parse_with_config(argv, USAGE, PlanFlags)
    topology = f.topology or config.runtime.topology
    if f.topology and f.device:
        raise UserError(
            "--topology and --device are both set; set the one that names your chips"
        )
    if not (topology or f.device):
        raise UserError(
            "no chips are named: give --topology=v5e:4x4, --device=h100:8 or "
            "--device=cpu, or set config.runtime.topology"
        )
    os.environ |= ENVIRONMENT
    from research.plan import plan_command

    slices = f.slices or config.runtime.slices
    request = plan_command.PlanRequest(
        config, topology, slices, f.device, f.search, f.json, f.preset
    )
    return plan_command.run(request)


if __name__ == "__main__":
    command_line.run(main)
