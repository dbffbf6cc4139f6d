"""Traces of a range of steps, which xprof and TensorBoard open."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from research.config.knob_groups import RuntimeConfig

StepFn = Callable[[Any, Any], tuple[Any, Any]]


@contextlib.contextmanager
def trace_steps(
    step_fn: StepFn, folder: Path, first: int, config: RuntimeConfig
) -> Iterator[StepFn]:
    """`step_fn` as it was, with those of its updates traced that `config` asks for.

    Leaving the context closes a trace that is still open: what a run that stops early
    has seen is kept.

    Args:
      step_fn: of one update.
      folder: of the trace: `plugins/profile/TIME/` within it.
      first: updates that the run has made before.
      config: `profile_from`, counted from 1, and `profile_steps`.
    """
    begin, count = config.profile_from, config.profile_steps
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
        # Closed as the next step begins, so that the wait counts as the step's own.
        if tracing and made == begin + count - 1:
            close(state)
        if made + 1 == begin:
            jax.block_until_ready(state)  # The step before is no part of it.
            jax.profiler.start_trace(folder)
            tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=made + 1):
            result = step_fn(state, batch)
        made += 1
        return result

    try:
        yield traced
    finally:
        if tracing:
            close(())
