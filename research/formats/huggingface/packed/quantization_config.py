"""The codes in which, as a `config.json` says, the weights of a folder lie."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.core.errors import UserError

READ = (
    "read are bitsandbytes in four bits (nf4, fp4), AWQ (four bits, version gemm), and "
    "GPTQ (four or eight bits, checkpoint_format gptq or gptq_v2)"
)
REMEDY = (
    "give the model as it was before, in float32, bfloat16 or float16, or a GGUF file"
)


@dataclasses.dataclass(frozen=True)
class Packing:
    """The codes of a folder.

    Attributes:
      method: the `quant_method` of its `quantization_config`.
      bits: of a code.
      group: inputs that share a scale; -1: all of them.
      from_one: the codes of zeros are one less than the zeros (GPTQ's first format).
    """

    method: str
    bits: int = 4
    group: int = -1
    from_one: bool = False


def read_packing(config: Mapping[str, Any], where: str) -> Packing | None:
    """The codes that `config`, of the file `where`, announces; None if it has none.

    Raises:
      UserError: they are of a sort that is not read, which is named.
    """
    said = config.get("quantization_config")
    if not isinstance(said, Mapping):
        return None
    method = str(said.get("quant_method"))
    readers = {"bitsandbytes": _bitsandbytes, "awq": _awq, "gptq": _gptq}
    if method not in readers:
        return Packing(method)
    packing = readers[method](said)
    if isinstance(packing, str):
        raise UserError(
            f"{where}: {method} with {packing} is not read; {READ}; {REMEDY}"
        )
    return packing


def _bitsandbytes(said: Mapping[str, Any]) -> Packing | str:
    if said.get("load_in_4bit", said.get("_load_in_4bit")) is not True:
        return "load_in_8bit" if _flag(said, "load_in_8bit") else "load_in_4bit unset"
    return Packing("bitsandbytes")


def _awq(said: Mapping[str, Any]) -> Packing | str:
    bits = said.get("bits", said.get("w_bit", 4))
    version = said.get("version", said.get("checkpoint_format", said.get("format")))
    if bits != 4:
        return f"bits {bits!r}"
    if str(version or "gemm").lower() != "gemm":
        return f"version {version!r}"
    if said.get("backend") == "llm-awq":
        return "backend 'llm-awq'"
    if said.get("zero_point", True) is not True:
        return "zero_point false"
    group = said.get("group_size", said.get("q_group_size", 128))
    return _with_group(Packing("awq"), group)


def _gptq(said: Mapping[str, Any]) -> Packing | str:
    bits = said.get("bits")
    layout = said.get("checkpoint_format", said.get("format")) or "gptq"
    if bits not in (4, 8):
        return f"bits {bits!r}"
    if _flag(said, "is_marlin_format"):
        return "is_marlin_format"
    if layout not in ("gptq", "gptq_v2"):
        return f"checkpoint_format {layout!r}"
    if said.get("pack_dtype", "int32") != "int32":
        return f"pack_dtype {said['pack_dtype']!r}"
    packing = Packing("gptq", bits, from_one=layout == "gptq")
    return _with_group(packing, said.get("group_size", 128))


def _with_group(packing: Packing, group: Any) -> Packing | str:
    if type(group) is not int or (group < 1 and group != -1):
        return f"group_size {group!r}"
    return dataclasses.replace(packing, group=group)


def _flag(said: Mapping[str, Any], name: str) -> bool:
    return bool(said.get(name, said.get(f"_{name}", False)))
