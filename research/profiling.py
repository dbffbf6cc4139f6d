"""Traces of a range of steps, which xprof and TensorBoard open."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

StepFn = Callable[[Any, Any], tuple[Any, Any]]


@contextlib.contextmanager
def trace_steps(
    step_fn: StepFn, folder: Path, first: int, begin: int, count: int
) -> Iterator[StepFn]:
    """`step_fn` as it was, the updates `begin` to `begin + count - 1` of it traced.

    Leaving the context closes a trace that is still open: what a run that stops early
    has seen is kept.

    Args:
      step_fn: of one update.
      folder: of the trace: `plugins/profile/TIME/` within it.
      first: updates that the run has made before.
      begin: the first update to trace, counted from 1; 0: none.
      count: how many.
    """
    if not begin:
        yield step_fn
        return
    made, tracing = first, False

    def close(state: Any) -> None:
        nonlocal tracing
        # Dispatched is not done: the devices are still at work.
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        tracing = False
        logging.info("trace: steps %d to %d in %s", begin, made, folder)

    def traced(state: Any, batch: Any) -> tuple[Any, Any]:
        nonlocal made, tracing
        if made + 1 == begin:
            # Steps that were dispatched before are not part of it.
            jax.block_until_ready(state)
            jax.profiler.start_trace(folder)
            tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=made + 1):
            result = step_fn(state, batch)
        made += 1
        if made == begin + count - 1 and tracing:
            close(result)
        return result

    try:
        yield traced
    finally:
        if tracing:
            close(())
