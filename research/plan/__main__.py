"""Plans a run before chips are rented: `python -m research.plan --config=FILE.py`.

The door alone; what a plan is made of stands in `planning/`.
"""

import os
from collections.abc import Sequence

from absl import flags

from research.config import command_line
from research.core.errors import UserError
from research.plan.compiled.libtpu_environment import ENVIRONMENT

USAGE = """
python -m research.plan --config=FILE.py [--config.KNOB=VALUE ...]
    [--topology=v5e:4x4] [--slices=2] | [--device=h100:8]

Compiles the real train step for TPUs that are not there (pip install libtpu, in an
environment of its own) and says what a chip's memory would hold, what chips send to
each other, how fast the run can be at best and what it costs. --device estimates the
same by formula, for any chip, without a compiler. No weight or data is read. Numbers
are of chips: the cloud's name v5p-512 counts cores, and is --topology=v5p:4x8x8.
"""

flags.DEFINE_string("topology", "", "TPU slice; default config.runtime.topology")
flags.DEFINE_integer("slices", 0, "how many of them; default config.runtime.slices")
flags.DEFINE_string("device", "", "estimate alone: h100:8, v5e:4x4, cpu")
flags.DEFINE_bool("search", False, "largest micro-batch, best layouts and remat")
flags.DEFINE_string("json", "", "also write the plan into this file")
flags.DEFINE_string("preset", "", "shape that stands for the config's model")


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0 fits, 1 does not."""
    command_line.define_config()
    command_line.parse(argv, USAGE, has_config=True)
    config = command_line.config_from_flags()
    f = flags.FLAGS
    topology = f.topology or config.runtime.topology
    if f.topology and f.device:
        raise UserError("--topology and --device are both given; one says the chips")
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
