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
    """Gives `step_fn`, which then also traces the steps that `config` chooses.

    Leaving the context closes an open trace, so a run that stops early keeps it.

    Args:
      step_fn: makes one update.
      folder: the trace goes into its `plugins/profile/TIME/`.
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
        # Steps are dispatched ahead: the devices may still be at work.
        jax.block_until_ready(state)
        jax.profiler.stop_trace()
        tracing = False
        logging.info("trace: steps %d to %d in %s", begin, made, folder)

    def traced(state: Any, batch: Any) -> tuple[Any, Any]:
        nonlocal made, tracing
        # Closed only as the next step begins, so the wait counts as part of a step.
        if tracing and made == begin + count - 1:
            close(state)
        if made + 1 == begin:
            jax.block_until_ready(state)  # The trace begins after the step before.
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
