"""Process start: distributed set-up, compilation cache, logging, device facts."""

import logging
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import psutil

from research.config.run_config import RuntimeConfig
from research.core import cache_folders
from research.core.errors import LonelyError, UserError
from research.parallel import chips, process_discovery


def start(config: RuntimeConfig) -> None:
    """Call once, before the first array."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    for chatty in ("jax", "orbax", "httpx", "datasets", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # Orbax logs through absl the tracebacks of errors that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if config.distributed:
        _join_processes(config)
    if jax.process_index() > 0:
        logging.getLogger().setLevel(logging.WARNING)
    _use_compilation_cache(config.compilation_cache)


def start_alone() -> None:
    """Starts a command that uses only the devices of its own process.

    Such a command has no config. Its compiled programs are kept in the user's cache.
    """
    start(RuntimeConfig(distributed=False))


def process_age() -> float:
    """Seconds since the start of the process, the interpreter's own included."""
    return time.time() - psutil.Process().create_time()


def abandon(error: BaseException, code: int) -> NoReturn:
    """Ends one process of several, now.

    An orderly end waits for the others, who wait for this one in a collective.
    """
    if isinstance(error, UserError):
        sys.stderr.write(f"error: {error}\n")
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # The others know each other through this one: let them say their own errors.
        time.sleep(1.0)
    os._exit(code)


def leave(code: int) -> NoReturn:
    """Ends this process for good when all is saved; with others, together with them.

    An orderly end waits for every thread, and one that reads data may hang: nobody
    who has asked a process to stop waits that long.
    """
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join_processes(config: RuntimeConfig) -> None:
    """Finds the other processes: by flags or environment, or as the cluster says.

    JAX kills a process without a word of what it was doing when another one has not
    been heard of; our own watchdog, which says it, comes first.

    Raises:
      UserError: neither says where they are.
      LonelyError: they do not answer.
    """
    flags = {
        "config.runtime.coordinator_address": config.coordinator_address,
        "config.runtime.num_processes": str(config.num_processes or ""),
        "config.runtime.process_id": (
            str(config.process_id) if config.process_id != -1 else ""
        ),
    }
    found = process_discovery.resolve(os.environ, flags)
    if found and found.count == 1:
        logging.info("processes: %s: nobody to join", found)
        return
    # Where all is named, nothing is to be detected; None stands for what JAX finds.
    named = (found.address, found.count, found.index) if found else (None, None, None)
    source = found.source if found else process_discovery.detected()
    devices = process_discovery.local_devices(os.environ)
    try:
        jax.distributed.initialize(
            *named,
            devices,
            cluster_detection_method="deactivate" if found else None,
            heartbeat_timeout_seconds=int(max(100, config.watchdog_s + 60)),
        )
    except (ValueError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        # Whoever waits for a slow machine may find it at the next start.
        kind = UserError if isinstance(error, ValueError) else LonelyError
        raise kind(
            f"config.runtime.distributed is set, and the other processes cannot be "
            f"joined ({first_line}); on a cluster that JAX does not know, give each "
            f"{', '.join(flags)}, or set {', '.join(process_discovery.EXPLICIT)}"
        ) from error
    joined = process_discovery.joined(source)
    logging.info("processes: %s", joined)
    if not found:
        process_discovery.check_slices(os.environ, joined.count)


def _use_compilation_cache(folder: str) -> None:
    if not folder:
        return
    if folder == "auto":
        folder = str(cache_folders.user_cache() / "compiled")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"compilation cache {folder} cannot be made ({error}); choose another "
            "with --config.runtime.compilation_cache=, or none with an empty one"
        ) from error
    jax.config.update("jax_compilation_cache_dir", folder)
    # The many small programs, too: reading them saves a warm start a fifth of its time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


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
            logging.info(
                "%s begun %.1f s after the start of the process", name, process_age()
            )
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
