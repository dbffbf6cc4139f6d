"""Adapter folders that are damaged, or not what they say: each is one sentence."""

import json
import re
import struct

import numpy as np
import pytest
from peft_exports import adapters_of, export_of, model_of, write_adapter

from research.core.errors import UserError
from research.formats.peft.adapter_config import CONFIG, PICKLED, TENSORS
from research.formats.peft.adapter_folder import AdapterFolder

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def export():
    """A small model with fused matrices of none, and the export of its adapters."""
    model = model_of("qwen2")
    return model, *export_of(model, *adapters_of(model))


def config(**fields):
    """Sets fields of the config; None removes one."""

    def change(folder):
        file = folder / CONFIG
        values = json.loads(file.read_text()) | fields
        kept = {name: value for name, value in values.items() if value is not None}
        file.write_text(json.dumps(kept))

    return change


def text(content):
    """Other bytes as the config."""
    return lambda folder: (folder / CONFIG).write_bytes(content)


def cut(at):
    """The first bytes of the tensors alone."""

    def change(folder):
        file = folder / TENSORS
        file.write_bytes(file.read_bytes()[:at])

    return change


def header(change):
    """Tensors with another header."""

    def write(folder):
        file = folder / TENSORS
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        new = change(content[8 : 8 + size].decode()).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])

    return write


def value(number, end="A.weight"):
    """A number in the middle of one tensor."""

    def change(folder):
        file = folder / TENSORS
        content = bytearray(file.read_bytes())
        (size,) = struct.unpack("<Q", content[:8])
        begin, _ = json.loads(content[8 : 8 + size])[Q + end]["data_offsets"]
        place = 8 + size + begin + 4
        content[place : place + 4] = np.float32(number).tobytes()
        file.write_bytes(content)

    return change


def replaced(name, make):
    """Something else under the name of a file."""

    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


def pickled(folder):
    (folder / TENSORS).rename(folder / PICKLED)


def first(pattern, new):
    return header(lambda old: re.sub(pattern, new, old, count=1))


CASES = {
    "empty config": (text(b""), "cannot be used"),
    "config of zeros": (text(bytes(64)), "cannot be used"),
    "list": (text(b"[]"), "it is [], not dict"),
    "number": (text(b"7"), "it is 7, not dict"),
    "not UTF-8": (text(b'{"r": "\xff\xfe"}'), "cannot be used"),
    "deep": (text(b"[" * 100_000), "cannot be used"),
    "digits": (text(b'{"peft_type": "LORA", "r": 1' + b"0" * 5000 + b"}"), "cannot be"),
    "half a config": (text(b'{"peft_type": "LORA", "r": 2'), "cannot be used"),
    "no rank": (config(r=None), "it lacks r"),
    "rank 0": (config(r=0), "r is 0; it must be above 0"),
    "rank below 0": (config(r=-4), "r is -4; it must be above 0"),
    "rank true": (config(r=True), "it.r is True, not int"),
    "huge rank": (config(r=10**9), "and adapter_config.json gives 1000000000 ("),
    "rank beyond": (config(r=2**40), "must be above 0 and below 2147483648"),
    "alpha 0": (config(lora_alpha=0), "lora_alpha is 0; it must be above 0"),
    "alpha NaN": (config(lora_alpha=float("nan")), "lora_alpha is nan; it must be"),
    "alpha infinite": (config(lora_alpha=float("inf")), "lora_alpha is inf; it must"),
    "alpha of text": (config(lora_alpha="16"), "it.lora_alpha is '16', not"),
    "flag of text": (config(use_rslora="false"), "use_rslora is 'false', not bool"),
    "name of a number": (config(base_model_name_or_path=7), "is 7, not str"),
    "half ranks": (config(rank_pattern={".*": 2.5}), "rank_pattern..* is 2.5, not int"),
    "ranks of none": (config(rank_pattern={".*": 0}), ".* is 0; it must be above 0"),
    "list of ranks": (config(rank_pattern=[2]), "rank_pattern is [2], not dict"),
    "matches nothing": (config(r=5, rank_pattern={"q_prj": 2}), "gives 5 (r, rank_pat"),
    "no expression": (config(rank_pattern={"(?P<": 2}), "is no regular expression"),
    "wide expression": (config(alpha_pattern={"a{99999999999}": 2}), "is no regular"),
    "parameters": (config(target_parameters="x"), "target_parameters is 'x', not list"),
    "no kind": (config(peft_type=None), "it lacks peft_type"),
    "empty tensors": (cut(0), "is not a safetensors file"),
    "short header": (cut(5), "is not a safetensors file"),
    "truncated": (cut(-40), "is not a safetensors file"),
    "NaN": (value(np.nan), "A.weight holds a number that is not finite"),
    "infinite": (value(-np.inf, "B.weight"), "B.weight holds a number that is not"),
    "codes": (first('"F32"', '"I32"'), "is stored as I32, not as float32"),
    "A without B": (first(r"q_proj\.lora_B", "q_proj.lora_C"), "lora_C.weight is part"),
    "magnitude": (first(r"q_proj\.lora_A\.weight", "q_proj.lora_magnitude_vector"),
                  "lora_magnitude_vector, and adapter_config.json does not say"),
    "another base": (header(lambda old: old.replace("layers.0.", "layers.9.")),
                     "another base model than"),
    "no adapter": (header(lambda old: old.replace("lora_", "lore_")), "another base"),
    "name twice": (first(r"q_proj\.lora_A", "q_proj.lora_B"), "safetensors"),
    "shape of text": (first(r'"shape":\[\d+', '"shape":["x"'), "is not a safetensors"),
    "link to nothing": (
        replaced(TENSORS, lambda file: file.symlink_to("gone")), "has no adapter_model"
    ),
    "link to itself": (
        replaced(TENSORS, lambda file: file.symlink_to(file)), "has no adapter_model"
    ),
    "folder": (replaced(TENSORS, lambda file: file.mkdir()), "has no adapter_model"),
    "folder of a config": (replaced(CONFIG, lambda x: x.mkdir()), f"has no {CONFIG}"),
    "no config": (replaced(CONFIG, lambda file: None), f"has no {CONFIG}"),
    "pickled": (pickled, "pickled and never read"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), CASES.values(), ids=CASES)
def test_a_damaged_folder_is_one_sentence(export, change, said, tmp_path):
    """Whoever opens it, or reads the first of its factors."""
    model, tensors, values = export
    folder = tmp_path / "adapter"
    write_adapter(folder, tensors, values)
    change(folder)
    with pytest.raises(UserError) as error:
        AdapterFolder(str(folder), model.architecture, model.specs).factors(
            "layers.attention.query.kernel"
        )
    message = str(error.value)

    assert said in message and str(folder) in message
    assert "\n" not in message and len(message) < 700
