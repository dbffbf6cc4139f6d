"""Searches the best mesh layouts: estimates all of them and compiles the best few."""

import collections
import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator

from research.config.choices import REMATS
from research.config.knob_groups import MeshConfig
from research.config.knobs import flat
from research.config.run_config import Config
from research.core.errors import UserError
from research.models.architecture import Architecture
from research.parallel import mesh as meshes
from research.plan import planner
from research.plan.planned_devices import PlannedDevices
from research.plan.planner import Plan

# Compiling takes about a minute a layout, an estimate milliseconds.
COMPILED = 3
SHOWN = 12
# A tensor axis wider than this leaves each device too little of a product.
WIDEST = 16


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """The best plans of a search.

    Attributes:
      plans: sorted from fastest to slowest; those that do not fit come last.
      refused: number of other layouts that were tried.
    """

    plans: list[Plan]
    refused: int


def search(
    config: Config,
    architecture: Architecture,
    target: PlannedDevices,
    compile_plan: Callable[[Config], Plan] | None = None,
    usable: float = math.inf,
) -> SearchResult:
    """Tries mesh layouts and remat policies, each with the largest micro-batch.

    The batch of a step is kept. `replica` equals the number of slices, and `context`
    is tried only if there are fewer rows than devices. Knobs that mean the same as the
    config's own stay as they are written there.

    Args:
      config: of the run.
      architecture: of the model.
      target: the chips.
      compile_plan: compiles one config; it checks the best estimates.
      usable: the bytes that an estimate may need, if they are less than the chips have.

    Raises:
      UserError: no layout divides the model and the batch.
    """
    tried, plans = 0, []
    causes: collections.Counter[str] = collections.Counter()
    experts = architecture.experts.count if architecture.experts else 0
    for mesh, remat in itertools.product(layouts(config, target, experts), REMATS):
        tried += 1
        try:
            plans += _largest(config, architecture, target, mesh, remat, usable)
        except UserError as error:
            causes[str(error)] += 1
    if not plans and causes.total() == tried:
        cause, count = causes.most_common(1)[0]
        raise UserError(
            f"none of {tried} layouts on {target.name} is possible: {count} of "
            f"them because {cause}"
        )
    if not plans:
        raise UserError(
            f"none of {tried} layouts on {target.name} divides {config.data.batch_size}"
            " rows and the model's dimensions; try another config.data.batch_size"
        )
    fitting = [plan for plan in plans if _fits(plan, usable)]
    fitting.sort(key=lambda plan: slowness(plan, config))
    best = fitting[:SHOWN] or [min(plans, key=lambda plan: plan.needed)]
    if compile_plan is not None:
        best = _check(best, compile_plan, config)
    return SearchResult(best, tried - len(best))


def _fits(plan: Plan, usable: float) -> bool:
    return plan.fits and plan.needed <= usable


def slowness(plan: Plan, asked: Config) -> tuple[bool, float, float, float]:
    """Sorts by time, halfway between full and no overlap, and then by memory.

    Where no speed is known, it sorts by how many knobs differ from those of `asked`,
    and then by the FLOPs that a step computes.
    """
    middle = (plan.best.seconds + plan.worst.seconds) / 2
    if plan.target.chip.flops:
        return (not plan.fits, round(middle, 6), 0.0, plan.needed)
    before = flat(asked)
    others = sum(before[knob] != value for knob, value in flat(plan.config).items())
    return (not plan.fits, others, plan.flops.total, plan.needed)


def layouts(
    config: Config, target: PlannedDevices, experts: int = 0
) -> Iterator[MeshConfig]:
    """Yields every split of the devices over data, fsdp, tensor, context and expert.

    `experts` of a layer are split where they divide; 0: the model has none.
    """
    own: dict[str, int] = {}
    with contextlib.suppress(UserError):  # It does not fit these devices.
        own |= meshes.make_mesh(config.mesh, target.devices()).shape
    replica = target.slices if target.slices > 1 else max(1, config.mesh.replica)
    each = target.count // replica
    rows = config.data.batch_size
    for tensor in (n for n in meshes.divisors(each) if n <= WIDEST):
        for context in meshes.divisors(each // tensor):
            rest = each // tensor // context
            if context > 1 and replica * rest * context <= rows:
                continue
            for fsdp, expert in itertools.product(meshes.divisors(rest), repeat=2):
                data, left = divmod(rest, fsdp * expert)
                if left or (
                    expert > 1 and (not experts or experts % (expert * tensor))
                ):
                    continue
                sizes = MeshConfig(replica, data, fsdp, tensor, context, expert)
                yield config.mesh if dataclasses.asdict(sizes) == own else sizes


def _largest(
    config: Config,
    architecture: Architecture,
    target: PlannedDevices,
    mesh: MeshConfig,
    remat: str,
    usable: float,
) -> list[Plan]:
    """The plan with the largest micro-batch that fits, or else with the smallest.

    The list is empty if no micro-batch of this layout divides the rows.
    """
    shards = meshes.batch_shards(meshes.make_mesh(mesh, target.devices()))
    rows = config.data.batch_size
    plans = []
    model = dataclasses.replace(config.model, remat=remat)
    for size in reversed(range(shards, rows + 1, shards)):
        if rows % size:
            continue
        data = config.data
        if size != data.rows_per_pass:
            data = dataclasses.replace(data, microbatch_size=size)
        tried = dataclasses.replace(config, mesh=mesh, model=model, data=data)
        plans = [planner.plan_estimate(tried, architecture, target)]
        if _fits(plans[0], usable):
            break
    return plans


def _check(
    plans: list[Plan], compile_plan: Callable[[Config], Plan], asked: Config
) -> list[Plan]:
    """Compiles the best plans until `COMPILED` of them fit; these come first.

    Raises:
      UserError: the compiler refuses every one of them.
    """
    checked: list[Plan] = []
    tried = 0
    refusal: UserError | None = None
    for plan in plans[: 2 * COMPILED]:
        if sum(p.fits for p in checked) == COMPILED:
            break
        logging.warning("compiling %s, the best of the rest", plan.mesh)
        tried += 1
        try:
            checked.append(compile_plan(plan.config))
        except UserError as error:
            # The plans so far took minutes to compile, so keep them.
            logging.warning("dropped this layout: %s", error)
            refusal = error
    if refusal and not checked:
        raise refusal
    checked.sort(key=lambda plan: slowness(plan, asked))
    found = [*checked, *plans[tried:]]
    return sorted(found, key=lambda plan: not plan.fits)
