"""The knobs to turn if a config does not fit: one answer for plan, search and launch.

They are those of the fastest layout that a search finds. Where no layout fits, other
knobs are set, too: those first that leave the training as it is, each as low as it
goes, one after the other, until the config fits. Then each is raised again as far as it
still fits, those first that change the training.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from research.config.choices import REMATS
from research.config.field_names import shell_flag
from research.config.knobs import changed, flat
from research.config.run_config import Config
from research.core.errors import UserError
from research.models.architecture import Architecture
from research.parallel import mesh as meshes
from research.parallel.chips import GIB
from research.plan import planner
from research.plan.layout_search import search
from research.plan.planned_devices import PlannedDevices
from research.plan.planner import USABLE, Plan

Knobs = Mapping[str, Any]
# Narrower passes and rows leave the chips little to do at once.
LEAST_CHUNK, LEAST_ROW = 128, 256
# A chunk that `head_chunk` chooses is halved from here: a sixteenth of the memory holds
# it, so less is rarely needed.
AUTOMATIC_CHUNK = 1024
# A tensor axis wider than this leaves each device too little of a product.
WIDEST = 16
# The most chips that are tried where those of the plan do not hold the config.
MOST_CHIPS = 1024


@dataclasses.dataclass(frozen=True)
class Change:
    """One knob to turn.

    Attributes:
      settings: its settings by decreasing memory, for a config on some devices.
      cost: what a run loses by it; empty if it trains the same.
    """

    settings: Callable[[Config, PlannedDevices], Iterator[Knobs]]
    cost: str = ""


def _layouts(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
    """Every matrix split as far as it goes, first by rows and then also by heads."""
    kept = max(1, config.mesh.context), max(1, config.mesh.expert)
    each, left = divmod(target.count // target.slices, math.prod(kept))
    for tensor in meshes.divisors(each, WIDEST) if not left else ():
        shards = target.slices * each // tensor * kept[1]
        if target.count > 1 and config.data.batch_size % shards == 0:
            sizes = (target.slices, 1, each // tensor, tensor, *kept)
            axes = ("replica", "data", "fsdp", "tensor", "context", "expert")
            yield {f"mesh.{axis}": n for axis, n in zip(axes, sizes, strict=True)}


def _spread(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
    yield from itertools.islice(_layouts(config, target), 1)


def _split_further(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
    for sizes in itertools.islice(_layouts(config, target), 1, None):
        rows = math.prod(sizes[f"mesh.{axis}"] for axis in meshes.BATCH_AXES)
        yield {**sizes, "data.microbatch_size": rows}


def _passes(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
    """Fewer rows hold fewer activations; a single pass holds no sum of gradients."""
    for size in reversed(meshes.divisors(config.data.batch_size)):
        if size != config.data.rows_per_pass:
            yield {"data.microbatch_size": size}


def _halves(
    knob: str, least: int, automatic: int = 0
) -> Callable[[Config, PlannedDevices], Any]:
    def settings(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
        value = (flat(config)[knob] or automatic) // 2
        while value >= least:
            yield {knob: value}
            value //= 2

    return settings


def _remats(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
    for policy in REMATS[REMATS.index(config.model.remat) + 1 :]:
        yield {"model.remat": policy}


def _narrow(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
    if config.model.dtype != "bfloat16":
        yield {"model.dtype": "bfloat16"}


def _narrow_trained(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
    if config.trainable == "full" and config.model.param_dtype != "bfloat16":
        yield {"model.param_dtype": "bfloat16"}


def _adapters(config: Config, target: PlannedDevices) -> Iterator[Knobs]:
    if config.trainable == "full" and config.model.init_from:
        yield {"trainable": "lora", "model.param_dtype": "float32"}


CHANGES = (
    Change(_spread),
    Change(_passes),
    Change(_remats),
    Change(_halves("model.loss_chunk", LEAST_CHUNK, automatic=AUTOMATIC_CHUNK)),
    Change(lambda config, target: iter([{"runtime.offload_optimizer": True}])),
    Change(_split_further),
    Change(_narrow, "products are rounded to bfloat16"),
    Change(_halves("data.seq_len", LEAST_ROW), "rows are cut shorter"),
    Change(_adapters, "adapters are trained in place of all weights"),
    Change(_narrow_trained, "trained weights are rounded to bfloat16"),
)
HARMLESS = tuple(change for change in CHANGES if not change.cost)


@dataclasses.dataclass(frozen=True)
class Advice:
    """The largest config that fits, or else the one that needs least.

    Attributes:
      flags: the knobs that differ from the config's, as the command line writes them.
      plan: the estimate with them.
      costs: what the run loses by them.
      fits: whether the plan fits.
      holds: if not, or if the run loses something, the same training on the fewest
        chips that hold it; None if no number of chips does.
    """

    flags: str
    plan: Plan
    costs: tuple[str, ...]
    fits: bool
    holds: "Advice | None" = None

    @property
    def words(self) -> str:
        """One clause without a full stop."""
        needed = f"{self.plan.needed / GIB:.1f} GiB of {self.plan.limit / GIB:.1f} GiB"
        if self.fits:
            costs = " and ".join(self.costs)
            setting = self.plan.setting and f"set {self.plan.setting}"
            facts = "; ".join(filter(None, (needed, costs, setting)))
            said = f"it fits with {self.flags} ({facts})"
        else:
            chip = self.plan.target.chip
            memory = math.ceil(self.plan.needed / USABLE / 1e9)
            kind = "machine" if chip.platform == "cpu" else "chip"
            said = f"nothing fits {self.plan.target.name}: it needs at least {needed}"
            said += f" ({self.plan.largest_part}){_with(self.flags)}"
            said += f"; that takes a {kind} of {memory} GB"
        if self.holds:
            name = self.holds.plan.target.name
            said += f"; the same training fits {name}{_with(self.holds.flags)}"
        return said


def _with(flags: str) -> str:
    return f", with {flags}" if flags else ""


def flags_between(old: Config, new: Config) -> str:
    """The flags that turn one config into another, for a shell."""
    before = flat(old)
    return " ".join(
        shell_flag(knob, value)
        for knob, value in flat(new).items()
        if before[knob] != value
    )


def advise(plan: Plan, architecture: Architecture, asked: Config) -> Advice:
    """Finds what to change in the config of a plan that does not fit.

    Flags are given for `asked`: the plan's config, or that which a search began with.
    Where the compiler has found that the plan needs more than its estimate, every
    estimate counts as so much more.
    """
    estimate = _replan(plan.config, architecture, {}, plan.target)
    limit = plan.limit
    if estimate:
        limit /= max(1.0, plan.needed / estimate.needed)
    with contextlib.suppress(UserError):  # No layout is possible.
        best = search(asked, architecture, plan.target, usable=limit).plans[0]
        if best.needed <= limit:
            return Advice(flags_between(asked, best.config), best, (), fits=True)
    replan = functools.partial(_replan, asked, architecture)
    lowest = _lowest(asked, plan.target, limit, CHANGES, replan)
    if lowest is None:  # Only layouts of a search can be laid on these chips.
        alone = functools.partial(_replan, plan.config, architecture)
        lowest = _lowest(plan.config, plan.target, limit, CHANGES, alone)
    assert lowest is not None, "the plan itself shows that its config can be planned"
    found = _raised(*lowest, limit, CHANGES, replan, asked)
    if found.fits and not found.costs:
        return found
    for target in _larger(plan.target):
        lowest = _lowest(asked, target, limit, HARMLESS, replan)
        if lowest and lowest[-1].needed <= limit:
            holds = _raised(*lowest, limit, HARMLESS, replan, asked)
            return dataclasses.replace(found, holds=holds)
    return found


Replan = Callable[[Knobs, PlannedDevices], Plan | None]


def _replan(
    config: Config, architecture: Architecture, knobs: Knobs, target: PlannedDevices
) -> Plan | None:
    """The estimate with other knobs; None if it cannot be split or trained so."""
    try:
        made = changed(config, knobs, "advice")
        return planner.plan_estimate(made, architecture, target)
    except UserError:
        return None


def _lowest(
    config: Config,
    target: PlannedDevices,
    limit: float,
    changes: Sequence[Change],
    replan: Replan,
) -> tuple[Config, dict[int, Knobs], Plan] | None:
    """Sets one knob after the other as low as it goes, until the plan fits.

    Returns the config, the knobs by their place in `changes`, and the plan with them;
    None if the config cannot be laid on the chips.
    """
    best = replan({}, target)
    taken: dict[int, Knobs] = {}
    for index, change in enumerate(changes):
        if best and best.needed <= limit:
            break
        for knobs in change.settings(best.config if best else config, target):
            made = replan(_merged({**taken, index: knobs}), target)
            if made and (best is None or made.needed <= best.needed):
                taken, best = {**taken, index: knobs}, made
    return (config, taken, best) if best else None


def _raised(
    config: Config,
    taken: dict[int, Knobs],
    best: Plan,
    limit: float,
    changes: Sequence[Change],
    replan: Replan,
    asked: Config,
) -> Advice:
    """Raises each knob of `_lowest` as far as it still fits; the last one first."""
    fits = best.needed <= limit
    enough = limit if fits else best.needed
    target = best.target
    for index in sorted(taken, reverse=True):
        others = {i: knobs for i, knobs in taken.items() if i != index}
        for knobs in ({}, *changes[index].settings(config, target)):
            made = replan(_merged({**others, index: knobs}), target)
            if made and made.needed <= enough:
                taken, best = {**others, index: knobs}, made
                break
    costs = tuple(changes[i].cost for i in sorted(taken) if taken[i])
    flags = flags_between(asked, best.config)
    return Advice(flags, best, tuple(filter(None, costs)), fits)


def _merged(taken: Mapping[int, Knobs]) -> Knobs:
    return {knob: v for i in sorted(taken) for knob, v in taken[i].items()}


def _larger(target: PlannedDevices) -> Iterator[PlannedDevices]:
    """More chips of the same kind, fewest first; a machine has no more memory."""
    if target.shape:
        for shape in target.chip.shapes:
            sizes = tuple(map(int, shape.split("x")))
            count = math.prod(sizes) * target.slices
            if count > target.count:
                yield dataclasses.replace(target, count=count, shape=sizes)
    elif target.chip.platform != "cpu":
        count = 2 * target.count
        while count <= MOST_CHIPS:
            yield dataclasses.replace(target, count=count)
            count *= 2
