"""Where the time of a compiled program goes, by operation, from JAX's own profiler.

A line of a trace is a thread of the CPU, a stream of a GPU or the operations of a TPU.
On a CPU an operation runs in the thread that has its event, and its parts may run in
others, whose work begins at a "region". The recorded flow from one to the other tells
to which operation that time belongs.
"""

import dataclasses
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from research.plan.compiled.hlo_text import HloInstruction, HloProgram

PRODUCT, MOVE, REST, LOOP = (
    "products",
    "copies, casts and transposes",
    "element-wise work and sums",
    "loops and dispatch",
)
REGION, REGION_END, RECORD = (
    f"ThreadpoolListener::{name}" for name in ("StartRegion", "StopRegion", "Record")
)
DISPATCH = "ThunkExecutor::Execute"
# An operation of these alone computes nothing.
MOVES = {
    *("bitcast", "broadcast", "concatenate", "constant", "convert", "copy", "iota"),
    *("dynamic-slice", "dynamic-update-slice", "get-tuple-element", "pad", "parameter"),
    *("reshape", "reverse", "slice", "transpose", "tuple"),
}
INDICES = {"s32[]", "s64[]", "u32[]", "pred[]"}
LOOPS = {"while", "call", "conditional", DISPATCH}


def trace(call: Callable[[], Any]) -> list[Any]:
    """Calls once, and gives the lines of the profile that show what devices did."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        planes = [
            plane
            for file in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        ]
    on_device = [plane for plane in planes if plane.name.startswith("/device:")]
    lines = [line for plane in on_device or planes for line in plane.lines]
    # Other lines of a GPU or a TPU repeat the same time by module and by scope.
    streams = [x for x in lines if x.name.startswith(("Stream", "XLA Ops"))]
    return streams or lines


def lanes() -> int:
    """How many operations can run at once: one on an accelerator, else the cores."""
    if jax.devices()[0].platform != "cpu":
        return 1
    return len(os.sched_getaffinity(0))


@dataclasses.dataclass
class _Span:
    """An interval of a line.

    Attributes:
      begin, end: in seconds.
      name: of the operation; empty for a region, and for what is no operation.
      flow: of a region, the flow that it continues.
      inside: seconds of other intervals inside it.
    """

    begin: float
    end: float
    name: str = ""
    flow: int | None = None
    inside: float = 0.0

    @property
    def own(self) -> float:
        return self.end - self.begin - self.inside


def read_calls(lines: list[Any]) -> dict[str, list[float]]:
    """The seconds of each call by the operation's name in the compiled program.

    They are those of all threads together, without operations inside the call.
    """
    owners: dict[int, _Span] = {}
    spans = [span for line in lines for span in _closed(line, owners)]
    seconds = {id(span): span.own for span in spans if span.name}
    between = 0.0
    for span in spans:
        if span.flow is not None and span.flow in owners:
            seconds[id(owners[span.flow])] += span.own
        elif span.flow is not None:
            between += span.own
    found: dict[str, list[float]] = {DISPATCH: [between]}
    for span in spans:
        if span.name:
            found.setdefault(span.name, []).append(seconds[id(span)])
    return found


def profile(
    step: Callable[[], float], traces: int
) -> tuple[dict[str, list[float]], float]:
    """The seconds of each call in some steps, as `read_calls`, and the mean step's.

    `step` takes one, and returns its seconds. Other work on a machine interrupts all
    operations alike, so many calls have true shares on a busy one, too.
    """
    found: dict[str, list[float]] = {}
    seconds: list[float] = []
    for _ in range(traces):
        for name, calls in read_calls(trace(lambda: seconds.append(step()))).items():
            found.setdefault(name, []).extend(calls)
    return found, sum(seconds) / traces


def _closed(line: Any, owners: dict[int, _Span]) -> list[_Span]:
    """The intervals of a line, with the time of those inside them.

    Notes in `owners` which operation began each flow.
    """
    open_spans: list[_Span] = []
    found: list[_Span] = []
    for span, started in _spans(line):
        while open_spans and span.begin >= open_spans[-1].end:
            open_spans.pop()
        if started is None:
            if open_spans:
                open_spans[-1].inside += span.end - span.begin
            open_spans.append(span)
            found.append(span)
        elif owner := next((x for x in reversed(open_spans) if x.name), None):
            owners[started] = owner
    return found


def _spans(line: Any) -> list[tuple[_Span, int | None]]:
    """The intervals of a line by their beginning, or a flow that begins there."""
    found, begun = [], None
    with warnings.catch_warnings():
        # The profiler's own types have no module.
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in line.events:
            stats = dict(event.stats)
            at, end = event.start_ns / 1e9, event.end_ns / 1e9
            if event.name == REGION:
                begun = at, stats.get("_c")
            elif event.name == REGION_END and begun:
                found.append((_Span(begun[0], at, flow=begun[1]), None))
                begun = None
            elif event.name == RECORD:
                found.append((_Span(at, at), stats.get("_p")))
            elif not event.name.startswith(("end: ", "ThreadpoolListener")):
                found.append((_Span(at, end, _name(event, stats)), None))
    return sorted(found, key=lambda x: (x[0].begin, -x[0].end))


def _name(event: Any, stats: dict[str, Any]) -> str:
    """The operation of an event; empty where the event is waiting or Python."""
    if "hlo_op" in stats:
        return str(stats["hlo_op"])
    if event.name == DISPATCH:
        return DISPATCH
    # A TPU has the whole instruction.
    return event.name.partition(" = ")[0].lstrip("%") if " = " in event.name else ""


def group_of(name: str, program: HloProgram) -> str:
    """The kind of work that an operation does."""
    instruction = next(
        (found[name] for found in program.computations.values() if name in found), None
    )
    if name in LOOPS or (instruction and instruction.opcode in LOOPS):
        return LOOP
    inside = _opcodes(instruction, program) if instruction else set()
    if inside & {"dot", "convolution"}:
        return PRODUCT
    if instruction and instruction.opcode == "custom-call":
        return instruction.attribute("custom_call_target")
    return MOVE if inside and inside <= MOVES else REST


def _opcodes(instruction: HloInstruction, program: HloProgram) -> set[str]:
    """The opcodes of an instruction, or of all that a fusion consists of.

    Scalar integers are not counted: they are places of slices.
    """
    if not instruction.runs:
        return set() if instruction.shape in INDICES else {instruction.opcode}
    return {
        opcode
        for called in instruction.runs
        for inner in program.computations[called].values()
        for opcode in _opcodes(inner, program)
    }
