"""Record tiny matrices in codes as their own libraries write and read them.

A part of its own, as `make golden` does not install these libraries. The two last ones
are needed as sources only, and run without a GPU:

    python3.11 -m pip install --no-deps bitsandbytes==0.50.2
    python3.11 -m pip download --no-deps auto-gptq==0.7.1 autoawq==0.2.9   # unpack both
    PYTHONPATH=autoawq-0.2.9:auto_gptq python3.11 tests/golden/packed.py

Each file of `packed/` has the tensors of one module `m` and, as `read`, the matrix
`[out, in]` that its library computes with. Rows of bitsandbytes are multiples of a
block: its CPU kernels of 0.50.2 compute other numbers of rows that are not.
"""

import importlib.util
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "packed"
OUT, IN, GROUP = 32, 128, 32


def matrix(dtype):
    torch.manual_seed(0)
    return (torch.randn(OUT, IN) * 0.05).to(dtype)


def record_bitsandbytes(levels, nested, dtype):
    codes, state = bnb.quantize_4bit(
        matrix(dtype), blocksize=64, quant_type=levels, compress_statistics=nested
    )
    parts = {f"m.weight.{name}": x for name, x in state.as_dict(packed=True).items()}
    read = bnb.dequantize_4bit(codes, state)
    kind = f"bitsandbytes_{levels}{'_nested' if nested else ''}"
    return kind, {"m.weight": codes, **parts, "read": read}


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
    (file, *_) = (p for folder in sys.path if (p := Path(folder) / inner).is_file())
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parts_of(module):
    return {f"m.{name}": x.contiguous() for name, x in module.state_dict().items()}


def main():
    FOLDER.mkdir(exist_ok=True)
    recorded = [
        record_bitsandbytes("nf4", True, torch.bfloat16),
        record_bitsandbytes("nf4", False, torch.float16),
        record_bitsandbytes("fp4", True, torch.float32),
        record_awq(),
        record_gptq(True, False),
        record_gptq(False, False),
        record_gptq(False, True),
    ]
    for name, tensors in recorded:
        save_file(tensors, FOLDER / f"{name}.safetensors")


if __name__ == "__main__":
    main()
