"""Compiler and library settings per chip, as data: set before JAX starts.

`default` sets those that suit every run and provably keep every number of a result. A
setting that can change a number, or that nobody has shown not to, must be named to be
set. `default` sets nothing for TPUs: libtpu already uses what Google suggests, the
latency-hiding scheduler and the fusion of asynchronous all-gathers.

These changes keep every number: another order of the same instructions, another place
or amount of memory, another way to move the same bytes. A setting that fuses, splits or
merges arithmetic may round differently. So may a reduction of merged buffers, because
their parts are then summed in another order around the ring.

Sources, by the name in `Setting.source`:
  jax     https://docs.jax.dev/en/latest/gpu_performance_tips.html
  flags   https://docs.jax.dev/en/latest/xla_flags.html
  memory  https://docs.jax.dev/en/latest/gpu_memory_allocation.html
  xla     https://openxla.org/xla/flags_guidance
  nvidia  https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance
  maxtext https://github.com/AI-Hypercomputer/maxtext/blob/main/benchmarks/xla_flags_library.py
  google  https://docs.cloud.google.com/tpu/docs/performance-guide
"""

import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence

from research.core.errors import UserError, nearest
from research.parallel.chips import CHIPS

# These variables hold many flags, and the last flag wins. All others hold one value.
OF_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# jaxlib does not start if both are set; the second one is the old name.
SAME = {"XLA_CLIENT_MEM_FRACTION": "XLA_PYTHON_CLIENT_MEM_FRACTION"}
GPUS = tuple(chip.name for chip in CHIPS.values() if chip.platform == "gpu")
TPUS = tuple(chip.name for chip in CHIPS.values() if chip.platform == "tpu")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A named choice for one environment variable.

    Attributes:
      name: its name in `--settings`.
      chips: the chips of `research/parallel/chips.py` that it is for.
      variable: the environment variable.
      value: the variable's value, or the flags to add to it.
      does: its purpose.
      changes_numbers: it can change a result, or nobody has shown that it does not.
      why: the reason for `changes_numbers`.
      source: names of the sources listed above.
      by_default: whether `default` includes it; never if it changes numbers.
    """

    name: str
    chips: tuple[str, ...]
    variable: str
    value: str
    does: str
    changes_numbers: bool
    why: str
    source: str
    by_default: bool = False


def _flags(*names: str, to: str = "true") -> str:
    return " ".join(f"--{name}={to}" for name in names)


SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting(
            "gpu-latency-hiding", GPUS, "XLA_FLAGS",
            _flags("xla_gpu_enable_latency_hiding_scheduler"),
            "computes while collectives are under way", False,
            "the scheduler comes after every rewrite and reorders instructions alone",
            "jax; nvidia; its one use is in xla/service/gpu/gpu_hlo_schedule.cc",
            by_default=True,
        ),
        # JAX's own 0.75 is less than a plan allows: research/plan/planner.py, USABLE.
        Setting(
            "gpu-memory", GPUS, "XLA_CLIENT_MEM_FRACTION", "0.92",
            "lets JAX use the share of memory that a plan allows", False,
            "the size of a pool; no program changes", "memory", by_default=True,
        ),
        Setting(
            "gpu-merge-gathers", GPUS, "XLA_FLAGS",
            _flags("xla_gpu_all_gather_combine_threshold_bytes", to="8589934592"),
            "one all-gather for all weights of a layer; takes memory", False,
            "bytes are moved, and nothing is added up", "jax; nvidia",
        ),
        Setting(
            "gpu-merge-reductions", GPUS, "XLA_FLAGS",
            _flags(
                "xla_gpu_reduce_scatter_combine_threshold_bytes",
                "xla_gpu_all_reduce_combine_threshold_bytes",
                to="8589934592",
            ),
            "one reduction for all gradients of a layer; takes memory", True,
            "a merged sum is cut into other pieces, added in another order",
            "jax; nvidia",
        ),
        Setting(
            "gpu-pipelined", GPUS, "XLA_FLAGS",
            _flags(
                "xla_gpu_enable_pipelined_all_gather",
                "xla_gpu_enable_pipelined_reduce_scatter",
                "xla_gpu_enable_while_loop_double_buffering",
            ),
            "gathers the next layer's weights during this one; takes memory", True,
            "the loop over layers is unrolled by two and fused anew", "flags; nvidia",
        ),
        Setting(
            "gpu-cublas", GPUS, "XLA_FLAGS",
            _flags("xla_gpu_enable_triton_gemm", to="false"),
            "matrix products by cuBLAS, none by Triton", True,
            "another kernel adds up in another order", "flags; nvidia",
        ),
        Setting(
            "gpu-nvls", ("h100", "h200"), "NCCL_NVLS_ENABLE", "1",
            "reductions inside the NVLink switch; takes memory", True,
            "the switch adds up in another order than the ring", "nvidia",
        ),
        Setting(
            "tpu-async-reduce", ("v5e",), "LIBTPU_INIT_ARGS",
            _flags(
                "xla_tpu_enable_async_collective_fusion",
                "xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
            ),
            "computes while all-reduces are under way", True,
            "sums are fused with products; nobody has shown that no bit changes", "xla",
        ),
        # For other chips libtpu 0.0.52 refuses to compile: "incorrect results, hang".
        Setting(
            "tpu-async-gather", ("v5e",), "LIBTPU_INIT_ARGS",
            _flags(
                "xla_tpu_enable_async_collective_fusion",
                "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
                "xla_tpu_enable_async_collective_fusion_multiple_steps",
                "xla_tpu_overlap_compute_collective_tc",
                "xla_enable_async_all_gather",
            ),
            "computes while all-gathers are under way, in several steps", True,
            "products are fused with transfers; nobody has shown that no bit changes",
            "flags; xla; maxtext",
        ),
        Setting(
            "tpu-overlap-slices", TPUS, "LIBTPU_INIT_ARGS",
            _flags(
                "xla_tpu_enable_data_parallel_all_reduce_opt",
                "xla_tpu_data_parallel_opt_different_sized_ops",
            ),
            "sums gradients between slices during the backward pass", True,
            "sums are moved through loops and may be added in another order",
            "flags; maxtext",
        ),
        Setting(
            "tpu-sparsecore", ("v5p", "v6e"), "LIBTPU_INIT_ARGS",
            _flags(
                "xla_sc_disable_megacore_partitioning",
                "xla_tpu_enable_all_reduce_offload_tracing",
                "xla_tpu_use_tc_device_shape_on_sc",
                "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
            )
            + " "
            + _flags(
                "xla_sc_enable_instruction_fusion", "xla_sc_disjoint_spmem", to="false"
            ),
            "all-reduces on the SparseCores", True,
            "another unit adds up; nobody has shown that no bit changes", "maxtext",
        ),
        Setting(
            "tpu-vmem", ("v6e",), "LIBTPU_INIT_ARGS",
            _flags("xla_tpu_scoped_vmem_limit_kib", to="98304"),
            "larger tiles of matrix products, less prefetching", True,
            "other tiles add up in another order", "xla; maxtext",
        ),
        Setting(
            "tpu-tight-schedule", TPUS, "LIBTPU_INIT_ARGS",
            _flags("xla_latency_hiding_scheduler_rerun", to="5"),
            "schedules again with less memory, for a step that hardly fits", False,
            "reorders instructions alone", "xla",
        ),
        Setting(
            "tpu-host-buffer", TPUS, "TPU_PREMAPPED_BUFFER_SIZE", "17179869184",
            "16 GiB of the host for transfers, as runtime.offload_optimizer makes them",
            False, "the size of a pool; no program changes", "google",
        ),
    )
}  # fmt: skip


def environment(
    chip: str, asked: Sequence[str], own: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Variables to set before JAX starts, merged with the user's own.

    A flag or variable that the user has set keeps its value; the user's flags come
    last. The result has only variables that a setting changes.

    Args:
      chip: a chip of `research/parallel/chips.py`, or empty if it is not known; then
        `default` sets nothing.
      asked: names of settings and `default`, or `none` alone.
      own: the user's environment.

    Raises:
      UserError: there is no such setting, or it is for other chips.
    """
    added: dict[str, list[str]] = {}
    for setting in _chosen(chip, asked):
        given = own.get(setting.variable, "")
        if setting.variable in OF_FLAGS:
            theirs = {_flag_name(flag) for flag in given.split()}
            flags = added.setdefault(setting.variable, [])
            for flag in setting.value.split():
                if _flag_name(flag) not in theirs and flag not in flags:
                    flags.append(flag)
        elif not given and not own.get(SAME.get(setting.variable, "")):
            added[setting.variable] = [setting.value]
    return {
        variable: " ".join([*values, own.get(variable, "")]).strip()
        for variable, values in added.items()
        if values
    }


def _chosen(chip: str, asked: Sequence[str]) -> list[Setting]:
    names = [name.strip() for name in asked if name.strip()]
    if "none" in names:
        if len(names) > 1:
            raise UserError(f"--settings={','.join(names)}: use none alone")
        return []
    if chip and chip not in CHIPS:
        raise UserError(
            f"no settings are known for chip {chip!r}{nearest(chip, CHIPS)}; "
            "--settings=none sets nothing"
        )
    chosen = {
        setting.name: setting
        for setting in SETTINGS.values()
        if "default" in names and setting.by_default and chip in setting.chips
    }
    for name in names:
        if name == "default":
            continue
        if name not in SETTINGS:
            raise UserError(
                f"--settings={name} is not known{nearest(name, SETTINGS)}; use "
                "default, none, or names of --settings=list"
            )
        if chip and chip not in SETTINGS[name].chips:
            raise UserError(
                f"--settings={name} is for {', '.join(SETTINGS[name].chips)}, not for "
                f"{chip}; remove it"
            )
        chosen[name] = SETTINGS[name]
    return list(chosen.values())


def _flag_name(flag: str) -> str:
    return flag.partition("=")[0].lstrip("-")


def table(width: int = 88) -> str:
    """All settings as text; `--settings=list` prints it."""
    parts = ["* marks the settings of `default`; the others must be named\n"]
    for setting in SETTINGS.values():
        mark = "*" if setting.by_default else " "
        changes = "may change" if setting.changes_numbers else "does not change"
        lines = (
            f"{setting.does}; {changes} numbers: {setting.why}",
            f"{setting.variable}: {setting.value}",
            f"source: {setting.source}",
        )
        parts.append(f"{mark} {setting.name}  ({', '.join(setting.chips)})")
        parts += [
            textwrap.fill(
                line, width, initial_indent=" " * 4, subsequent_indent=" " * 6,
                break_long_words=False, break_on_hyphens=False,
            )
            for line in lines
        ]  # fmt: skip
        parts.append("")
    sources = (__doc__ or "").partition("`Setting.source`:\n")[2]
    return "\n".join([*parts, "sources:", sources])
