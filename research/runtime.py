"""Process start: distributed set-up, compilation cache, logging, device facts."""

import logging
import os
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from research import caches, chips
from research.config import RuntimeConfig
from research.errors import UserError

_interrupted = threading.Event()


def start(config: RuntimeConfig) -> None:
    """Call once, before the first array."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    for chatty in ("jax", "absl", "orbax", "httpx", "datasets", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    if config.distributed:
        _join_processes()
    if jax.process_index() > 0:
        logging.getLogger().setLevel(logging.WARNING)
    _use_compilation_cache(config.compilation_cache)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def raise_if_interrupted() -> None:
    """Raises KeyboardInterrupt if one has been lost on the way.

    Python drops what is raised while it runs a destructor: a Ctrl-C that falls into
    one would be forgotten, and a run begin that nobody wants any more.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _join_processes() -> None:
    """Finds the other processes: named in the environment, or as the cluster says.

    Raises:
      UserError: neither says where they are, or they do not answer.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, index = (os.environ.get(name) for name in names)
    try:
        if address and count and index:
            jax.distributed.initialize(address, int(count), int(index))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(
            f"config.runtime.distributed is set, and the other processes cannot be "
            f"joined ({first_line}); on a cluster that JAX does not know, set "
            f"{', '.join(names)} for each"
        ) from error


def _use_compilation_cache(folder: str) -> None:
    if not folder:
        return
    if folder == "auto":
        folder = str(caches.user_cache() / "compiled")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"compilation cache {folder} cannot be made ({error}); choose another "
            "with --config.runtime.compilation_cache=, or none with an empty one"
        ) from error
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def announce_first_call(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function`, and one line in the log when its first call is under way.

    A jitted function returns from its first call once it is compiled, or read from
    the compilation cache, and has been given to the devices.
    """
    waiting = True

    def call(*args: Any) -> Any:
        nonlocal waiting
        result = function(*args)
        if waiting:
            waiting = False
            age = time.time() - psutil.Process().create_time()
            logging.info("%s begun %.1f s after the start of the process", name, age)
        return result

    return call


def peak_flops(config: RuntimeConfig, dtype: str) -> float | None:
    """FLOP/s that all devices could do at best, or None where it is not known.

    A CPU has no data sheet worth the name: its peak is what a large matrix product
    in `dtype` reaches here and now.
    """
    devices = jax.devices()
    if config.peak_tflops > 0:
        return config.peak_tflops * 1e12 * len(devices)
    if devices[0].platform == "cpu":
        return _measured_matmul_flops(dtype)
    chip = chips.by_device_kind(devices[0].device_kind)
    return chip.flops * len(devices) if chip else None


def _measured_matmul_flops(dtype: str) -> float:
    """Of one process's cores; virtual devices share them."""
    size = 1536
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        multiply(x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(seconds)


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the first device, or of the process on CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
