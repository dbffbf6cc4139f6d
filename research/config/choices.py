"""The option lists that a knob and another room share: each name is written once.

A registry in a later room has an entry for each name; tests/core/test_choices.py
compares them.
"""

# Each kind of adapter names a module whose `KIND` is an `AdapterKind`. A new kind is a
# file and a line here. The modules are imported on use, so launchers read the names
# without JAX.
ADAPTER_MODULES = {"lora": "research.weights.adapters.lora"}
# Each format of frozen weights names a module whose `FORMAT` is a `BaseFormat`.
BASE_FORMAT_MODULES = {"plain": "research.weights.representations.plain_array"}
# Each format of `research.export` names a module whose `FORMAT` is an `ExportFormat`.
EXPORT_MODULES = {
    "hf": "research.formats.huggingface.huggingface_export",
    "peft": "research.formats.peft.peft_format",
    "gguf": "research.formats.gguf.gguf_model",
    "gguf-adapter": "research.formats.gguf.gguf_adapter",
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
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
UNDECODABLE = ("stop", "skip", "replace")
