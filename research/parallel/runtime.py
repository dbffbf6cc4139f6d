"""The start and the end of a process, its compilation cache, and its device's facts."""

import contextlib
import ctypes
import logging
import os
import resource
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import psutil

from research.config.knob_groups import RuntimeConfig
from research.core import cache_folders
from research.core.errors import LonelyError, UserError
from research.core.local_paths import local_path
from research.parallel import chips, process_discovery, rendezvous

# Seconds in which the processes of a run must find each other. JAX waits as long.
JOIN_TIME = 300.0
GUARDS = ("", "_host_to_device", "_device_to_device", "_device_to_host")
# Arrays have the types that the code gives them, and a seed always the same numbers:
# frozen random weights are made again from it, wherever the run is opened.
NUMBERS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    # Runs move arrays between hosts and devices, which a guard may forbid.
    **{f"jax_transfer_guard{way}": "allow" for way in GUARDS},
}


def start(config: RuntimeConfig, *, ahead: bool = False) -> None:
    """Sets up logging, joins the other processes, and sets the compilation cache.

    Call it once, before the first array is made.

    Args:
      config: of the command.
      ahead: on a CPU, Python continues while a program runs. Training gains nothing by
        that, see `_compute_in_this_thread`.

    Raises:
      UserError: the config does not lead to the other processes, the folder of the
        compilation cache cannot be made, or JAX finds no device.
      LonelyError: the other processes do not answer.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True
    )
    for chatty in ("jax", "orbax", "httpx", "datasets", "huggingface_hub"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    # Orbax raises its errors and also logs their tracebacks through absl.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    _use_own_numbers()
    if not ahead:
        _compute_in_this_thread()
    if config.distributed:
        _join_processes(config)
    _require_devices()
    if jax.process_index() > 0:
        logging.getLogger().setLevel(logging.WARNING)
    _use_compilation_cache(config.compilation_cache)


def _use_own_numbers() -> None:
    """Undoes settings of the environment that would change the numbers of a run."""
    for name, value in NUMBERS.items():
        # A guard that is not set has no value.
        if getattr(jax.config, name) not in (value, None):
            logging.info("%s is set, and not used: runs compute alike", name.upper())
            jax.config.update(name, value)


def _compute_in_this_thread() -> None:
    """Has CPU devices compute in the thread that calls a program, not in one of JAX's.

    Whatever the Makefile's settings, glibc keeps more than 64 MB for the main thread
    alone: it returned the temporary arrays of a step to the system after each step. To
    clear their pages again took a seventh of the CPU seconds of a small step.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def computes_in_this_thread() -> bool:
    """Whether the call of a program on one device returns when it has computed.

    All processes of a run have the same answer. With several devices a process has to
    wait for the result of such a call, too.
    """
    ahead = jax.config.read("jax_cpu_enable_async_dispatch")
    return jax.default_backend() == "cpu" and not ahead


def _require_devices() -> None:
    """Starts JAX's devices. Raises UserError if there are none."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # The second has no words.
        wanted = jax.config.jax_platforms or "not set"
        cause = " ".join(str(error).split())[:300] or "nothing of JAX runs on it"
        raise UserError(
            f"JAX finds no device ({cause}); JAX_PLATFORMS is {wanted}: name a "
            "platform of this machine, such as cpu, or install JAX for the other one"
        ) from error


def start_alone() -> None:
    """Starts a command that uses only the devices of its own process.

    Such a command has no config. Its compiled programs are kept in the user's cache.
    """
    start(RuntimeConfig(distributed=False), ahead=True)


def process_age() -> float:
    """Seconds since the process started, including the start of the interpreter."""
    return time.time() - psutil.Process().create_time()


def abandon(error: BaseException, code: int) -> NoReturn:
    """Ends this process of several at once, with `error` on standard error.

    An orderly end would wait for the other processes, and those wait for this one in
    a collective.
    """
    if isinstance(error, UserError):
        sys.stderr.write(f"error: {error}\n")
    elif not isinstance(error, SystemExit):  # That has been explained.
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        # Process 0 is the coordinator. The others get time to report their errors.
        time.sleep(1.0)
    os._exit(code)


def leave(code: int) -> NoReturn:
    """Ends this process when everything is saved, together with the other processes.

    An orderly end would wait for every thread, and a thread that reads data may hang.
    The sender of a stop signal does not wait that long.
    """
    if jax.process_count() > 1:
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join_processes(config: RuntimeConfig) -> None:
    """Joins the processes that flags, the environment or the cluster name.

    JAX kills a process when the heartbeats of another one stop, and does not report
    what the process was doing. The heartbeat timeout is therefore longer than that of
    our watchdog, which does report it.

    Raises:
      UserError: nothing says where the other processes are.
      LonelyError: the other processes do not answer.
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
        logging.info("processes: %s: none to join", found)
        return
    # JAX detects the values that are None.
    named = (found.address, found.count, found.index) if found else (None, None, None)
    source = found.source if found else process_discovery.detected()
    devices = process_discovery.local_devices(os.environ)
    patience = min(JOIN_TIME, config.watchdog_s or JOIN_TIME)
    if found:
        rendezvous.meet(found, patience)
    try:
        with _answered_within(patience):
            jax.distributed.initialize(
                *named,
                devices,
                cluster_detection_method="deactivate" if found else None,
                initialization_timeout=int(patience + 60),
                heartbeat_timeout_seconds=int(max(100, config.watchdog_s + 60)),
            )
    except (ValueError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        # A machine that is only slow may answer at the next start.
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


@contextlib.contextmanager
def _answered_within(seconds: float) -> Iterator[None]:
    """Ends the process if the body takes longer; JAX itself would abort it."""

    def end() -> None:
        sys.stderr.write(
            f"error: the other processes of this run have not come within {seconds:g} "
            "s: one is missing, or a number was given twice; see their own output\n"
        )
        sys.stderr.flush()
        os._exit(LonelyError.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _use_compilation_cache(folder: str) -> None:
    if not folder:
        return
    auto = folder == "auto"
    try:
        where = cache_folders.user_cache() / "compiled" if auto else local_path(folder)
        where.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        if auto:
            logging.warning(
                "compiled programs are not kept (%s); "
                "--config.runtime.compilation_cache= names a folder for them",
                error,
            )
            return
        raise UserError(
            f"compilation cache {folder} cannot be made ({error}); choose another "
            "with --config.runtime.compilation_cache=, or none with an empty one"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(where))
    # Small programs are cached too: reading them saves a fifth of a warm start.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def announce_first_call(function: Any, name: str) -> Callable[..., Any]:
    """`function`, which logs one line when its first call begins to compute.

    It is jitted, and compiled before, or read from the compilation cache. The call
    finds what was compiled.
    """
    waiting = True

    def call(*args: Any) -> Any:
        nonlocal waiting
        if not waiting:
            return function(*args)
        waiting = False
        function.lower(*args).compile()
        logging.info(
            "%s begun %.1f s after the start of the process", name, process_age()
        )
        return function(*args)

    return call


def peak_flops(config: RuntimeConfig) -> float | None:
    """The peak FLOP/s of all devices together, or None where no data sheet says it.

    So a CPU has no MFU, unless the config gives a peak: products that were measured at
    two starts beside other work differed by a factor of two.
    """
    devices = jax.devices()
    if config.peak_tflops > 0:
        return config.peak_tflops * 1e12 * len(devices)
    chip = chips.by_device_kind(devices[0].device_kind)
    return chip.flops * len(devices) if chip else None


def measure_matmul_flops(dtype: str) -> float:
    """FLOP/s of a large product in `dtype` on the cores of this process, right now."""
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


def return_free_memory() -> None:
    """Gives memory that C code has freed back to the system, on glibc and CPU devices.

    The Makefile's allocator keeps what a compilation or an evaluation has freed. Those
    pieces are too small for the arrays of a step, which would take more memory instead.
    """
    if jax.local_devices()[0].platform == "cpu":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def peak_memory_bytes() -> int:
    """Peak memory in use, in bytes: of the first device, or of the process on CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
