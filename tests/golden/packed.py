"""Record tiny matrices in codes as their own libraries write and read them.

`make golden` installs the libraries, whose kernels for GPUs are not used, and runs

    PYTHONPATH=.venv-torch/packed .venv-torch/bin/python tests/golden/packed.py --check

Each file of `packed/` has the tensors of one module `m` and, as `read`, the matrix
`[out, in]` that its library computes with; those of bitsandbytes have the matrix that
was rounded as `weight`. Rows of bitsandbytes are multiples of a
block: its CPU kernels of 0.50.2 compute other numbers of rows that are not. Without
`--check` the files are written.
"""

import argparse
import importlib.util
import sys
import types
import warnings
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "packed"
OUT, IN, GROUP = 32, 128, 32


def matrix(dtype):
    torch.manual_seed(0)
    return (torch.randn(OUT, IN) * 0.05).to(dtype)


def record_bitsandbytes(levels, nested, dtype):
    weight = matrix(dtype)
    codes, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type=levels, compress_statistics=nested
    )
    parts = {f"m.weight.{name}": x for name, x in state.as_dict(packed=True).items()}
    read = bnb.dequantize_4bit(codes, state)
    kind = f"bitsandbytes_{levels}{'_nested' if nested else ''}"
    return kind, {"m.weight": codes, **parts, "read": read, "weight": weight}


def linear():
    module = torch.nn.Linear(IN, OUT, bias=False)
    module.weight.data = matrix(torch.float16)
    return module


def scales_and_zeros(groups, symmetric):
    """Both `[out, groups]`, for codes of four bits."""
    blocks = matrix(torch.float32)
    low, high = (
        torch.stack([f(blocks[:, groups == g]) for g in range(IN // GROUP)], 1)
        for f in (lambda x: x.min(1)[0], lambda x: x.max(1)[0])
    )
    if symmetric:
        scales = torch.maximum(-low, high) / 7.5
        return scales.half(), torch.full_like(scales, 8.0).half()
    scales = (high - low) / 15
    return scales.half(), torch.round(-low / scales).clamp(1, 15).half()


def record_awq():
    # Without its `__init__`, which fails beside a later transformers.
    package = sys.modules["awq"] = types.ModuleType("awq")
    package.__path__ = [str(found("awq"))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils.packing_utils import dequantize_gemm

    groups = torch.arange(IN) // GROUP
    scales, zeros = (x.T.contiguous() for x in scales_and_zeros(groups, False))
    made = WQLinear_GEMM.from_linear(linear(), 4, GROUP, scales=scales, zeros=zeros)
    read = dequantize_gemm(made.qweight, made.qzeros, made.scales, 4, GROUP)
    return "awq", parts_of(made) | {"read": read.T.contiguous()}


def record_gptq(symmetric, act_order):
    linear_of_gptq = alone("auto_gptq/nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    torch.manual_seed(1)
    order = torch.randperm(IN) if act_order else torch.arange(IN)
    groups = (order // GROUP).to(torch.int32)
    scales, zeros = scales_and_zeros(groups, symmetric)
    made = linear_of_gptq(4, GROUP, IN, OUT, bias=False)
    made.pack(linear(), scales, zeros, groups)
    read = made(torch.eye(IN, dtype=torch.float16)).T.contiguous()
    kind = f"gptq_{'sym' if symmetric else 'asym'}{'_act_order' if act_order else ''}"
    return kind, parts_of(made) | {"read": read}


def alone(inner):
    """A module without its package, which fails beside a later transformers."""
    file = found(inner)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def found(inner):
    return next(p for folder in sys.path if (p := Path(folder) / inner).exists())


def parts_of(module):
    return {f"m.{name}": x.contiguous() for name, x in module.state_dict().items()}


def recorded():
    return [
        record_bitsandbytes("nf4", True, torch.bfloat16),
        record_bitsandbytes("nf4", False, torch.float16),
        record_bitsandbytes("fp4", True, torch.float32),
        record_awq(),
        record_gptq(True, False),
        record_gptq(False, False),
        record_gptq(False, True),
    ]


def is_stored(name, tensors):
    """Prints whether the file of that name holds these very tensors."""
    stored = load_file(FOLDER / f"{name}.safetensors")
    odd = sorted(tensors.keys() ^ stored.keys())
    odd += [
        key
        for key in sorted(tensors.keys() & stored.keys())
        if tensors[key].dtype != stored[key].dtype
        or not torch.equal(tensors[key], stored[key])
    ]
    print(f"codes {name}: {'ok' if not odd else 'DIFFERS: ' + ', '.join(odd)}")
    return not odd


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the files")
    is_check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    agreed = True
    for name, tensors in recorded():
        if is_check:
            agreed &= is_stored(name, tensors)
        else:
            save_file(tensors, FOLDER / f"{name}.safetensors")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
