"""The option lists that a knob and another room share: each name is written once.

A registry in a later room has an entry for each name; tests/core/test_choices.py
compares them. At the end is the spelling of `pattern=format`, which is shared as well.
"""

import dataclasses
import itertools
import re
from collections.abc import Sequence

EXPORT_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class FormatChoice:
    """A format of `research.export`.

    Attributes:
      module: whose `FORMAT` is an `ExportFormat`; it is imported on use.
      title: for people.
      dtypes: of the weights in its files; the first is the usual one.
      quants: codes that its matrices can be in.
    """

    module: str
    title: str
    dtypes: tuple[str, ...] = EXPORT_DTYPES
    quants: tuple[str, ...] = ()


# Each kind of adapter names a module whose `KIND` is an `AdapterKind`. A new kind is a
# file and a line here. The modules are imported on use, so launchers read the names
# without JAX.
ADAPTER_MODULES = {
    "lora": "research.weights.adapters.lora",
    "dora": "research.weights.adapters.dora",
    "gaussian": "research.weights.adapters.starts.gaussian",
    "orthogonal": "research.weights.adapters.starts.orthogonal",
    "pissa": "research.weights.adapters.starts.pissa",
    "olora": "research.weights.adapters.starts.olora",
    "vera": "research.weights.adapters.vera",
    "eva": "research.weights.adapters.starts.eva",
    "loftq": "research.weights.adapters.starts.loftq",
    "qera": "research.weights.adapters.starts.qera",
}
# Kinds that differ only in their start have the arrays of another one.
SAME_ARRAYS = {
    **dict.fromkeys(("gaussian", "orthogonal", "loftq", "qera"), "lora"),
    "olora": "pissa",
}
# Kinds that compute the same of their arrays, so that they train as one program.
STARTS = ("gaussian", "orthogonal", "pissa", "olora", "eva", "loftq", "qera")
LOW_RANK = ("lora", *STARTS)
# Kinds that a serving bank has room for, so that runs of them share one base: a product
# of factors changes a weight, and DoRA then multiplies its outputs.
SHARE_BASE = (*LOW_RANK, "vera", "dora")
# Each format of frozen weights names a module whose `FORMAT` is a `BaseFormat`.
BASE_FORMAT_MODULES = {
    "none": "research.weights.representations.plain_array",
    "int8": "research.weights.quantized.int8_weights",
    "int4": "research.weights.quantized.int4_weights",
    "int4_32": "research.weights.quantized.int4_32_weights",
    "nf4": "research.weights.quantized.nf4_weights",
    "nf4_16": "research.weights.quantized.nf4_16_weights",
    "keep": "research.weights.quantized.kept_codes",
}
KEEP = "keep"  # The one that is read as codes, where others are made of numbers.
# The base under the adapters of an export, where a run has trained over codes.
DEQUANTISED, ORIGINAL = EXPORT_BASES = "dequantised", "original"
# The formats of `research.export`, by name.
EXPORT_FORMATS = {
    "hf": FormatChoice(
        "research.formats.huggingface.huggingface_export", "Hugging Face folder, merged"
    ),
    "peft": FormatChoice("research.formats.peft.peft_format", "adapter of PEFT"),
    "gguf": FormatChoice(
        "research.formats.gguf.gguf_model", "GGUF, merged", quants=("q8_0", "q4_0")
    ),
    "gguf-adapter": FormatChoice(
        "research.formats.gguf.gguf_adapter", "adapter in GGUF", ("float32",)
    ),
}
# Each kind of task, a value of `config.data.kind`, names a module whose `KIND` is a
# `tasks.task_protocol.TaskKind`. A new task is a line here, or
# `TASK_MODULES["name"] = "module"` in a file that a run imports.
TASK_MODULES = {
    "instructions": "research.tasks.instruction_tuning",
    "text": "research.tasks.pretraining",
}
# Each value of `config.data.source` is a dataset of the hub.
ROW_SOURCES = {"dolly": "hub://databricks/databricks-dolly-15k"}
EMBEDDED = "embedded"  # As `data.path`: the sample that is part of this package.

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
# "auto" picks one of the kernels for the devices at hand.
AUTO = "auto"
KERNELS = ("xla", "cudnn", "cudnn_mask", "splash")
EXPERT_KERNELS = ("blocked", "ragged_dot", "tokamax")
REMATS = ("none", "dots", "full")
DTYPES = ("bfloat16", "float32")
UNDECODABLE = ("stop", "skip", "replace")


# Names between commas, which stand for as many patterns.
LISTED = re.compile(r"[\w.-]+( *, *[\w.-]+)+")


def listed_patterns(written: str) -> list[str]:
    """The pattern `written`, or the several names that it holds between commas."""
    several = LISTED.fullmatch(written)
    return written.replace(" ", "").split(",") if several else [written]


def split_entry(entry: str) -> tuple[str, str]:
    """The pattern and the format of an entry of `config.model.quantize_paths`.

    The pattern is "" if it names none.
    """
    pattern, _, form = entry.rpartition("=")
    return pattern.strip(), form.strip()


def normalised(entries: Sequence[str]) -> tuple[str, ...]:
    """One spelling of all entries that mean the same for every model.

    An entry has one pattern, an earlier one of the same pattern is gone, and neighbours
    with one format are sorted. Those with different formats keep their order, as the
    last match counts, and which matrices both match depends on the model.
    """
    last: dict[str, str] = {}
    for pattern, form in map(split_entry, entries):
        for one in listed_patterns(pattern):
            last.pop(one, None)
            last[one] = form
    groups = itertools.groupby(last, key=last.__getitem__)
    return tuple(
        f"{pattern}={form}" for form, found in groups for pattern in sorted(found)
    )
