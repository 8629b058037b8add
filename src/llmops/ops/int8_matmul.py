"""y = x @ dequantize(W).T with W in int8 and x rounded to int8 on the way in, each token with a scale of its own.

    s_t = absmax(x_t) / 127          a_tk = round(x_tk / s_t), to even at ties        int8, symmetric, in [-127, 127]
    y_to = s_t s_o sum_k a_tk w_ok + bias_o                                           the sum in integers: exact

This is what servers compute (vLLM's dynamic per-token quantization and CUTLASS's int8 product), with x as it comes and
the scales in float32. compressed-tensors in plain transformers imitates it in the model's own type with s_t = absmax /
127.5, which clamps the largest value half a step short: its logits differ from these, and from the servers', by that.

    reference     any device. The sum as products in float32 over at most 1,024 inputs, each exact (127 * 128 * 1024 <
                  2^24), added up in float64.
    torch:int_mm  `torch._int_mm` on the codes as they are stored: CUDA, and on a CPU layers of up to 2^19 weights.
    triton        CUDA (package `llmops_kernels`): the activations rounded, multiplied and scaled in two kernels.
    ops           the same two ops on a device without the kernels: their PyTorch reference, for comparison.
    torch:qlinear larger layers on a CPU: oneDNN's int8 product behind `onednn::qlinear_pointwise`, weights in its own
                  layout. It takes unsigned activations, so a_tk + 128 goes in with 128 as zero point.

On a CPU both are chosen only where oneDNN adds the products without saturation (VNNI; older AVX2 code adds pairs in 16
bits), which is tried once on the worst case. `_int_mm` arranges the weight anew in each call, which a large layer pays
for, and has next to no overhead, which a small one is made of (one core of an AVX-512 EPYC with VNNI, microseconds for
1 and for 32 tokens: 256 x 256 3 and 9 against 20 and 23, bfloat16 16 and 22; 2048 x 2048 130 and 642 against 122 and
461, bfloat16 488 and 1,028).

Why not the op with the best name: `quantized::linear_dynamic` (fbgemm) rounds the whole batch with one scale and a zero
point, so an outlier in one token coarsens all the others, and a token's score depends on its neighbours. Signed
activations in qlinear are correct and a thousand times slower.

Shapes: x (..., in); W (out, in); y (..., out).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from llmops.errors import LlmopsError, unknown

__all__ = ["TOP", "accumulate", "choose", "describe", "int8_matmul", "on_codes", "prepare", "qlinear_is_exact",
           "quantize_rows", "recover", "triton_here"]

REFERENCE, QLINEAR, INT_MM, TRITON, OPS = "reference", "torch:qlinear", "torch:int_mm", "triton", "ops"
CHOICES = ("auto", "torch", "triton", "ops", "reference")
TOP = 127.0
LEAST = 2.0**-80  # below it all of a token is rounded to nothing
SMALL = 1 << 19  # weights of a layer up to which a CPU is faster without a layout
CHUNK = 1024  # inputs whose products sum exactly in float32
Held = Mapping[str, Tensor]


def choose(rows: int, columns: int, *, device: str, kernel: str = "auto") -> str:
    """The name of the kernel for a weight (rows, columns) on a device type.

    kernel: "auto" takes the kernel on a GPU, else as "torch" the stock op that fits; "reference" forces the reference,
    "ops" the ops of `llmops_kernels` on any device. Raises LlmopsError for "triton" without a GPU or the package, and
    for an unknown name.
    """
    if kernel not in CHOICES:
        raise LlmopsError(unknown("kernel", kernel, CHOICES))
    if kernel == "triton" and (device != "cuda" or not triton_here()):
        raise LlmopsError(f"kernel triton for int8 weights on device {device}; it needs CUDA, triton and "
                          "llmops_kernels: use auto, torch or reference")
    if kernel in ("triton", "ops"):
        return TRITON if device == "cuda" else OPS
    if kernel == "auto" and device == "cuda" and triton_here():
        return TRITON
    if kernel != "reference" and device == "cpu" and rows * columns and qlinear_is_exact():
        return INT_MM if rows * columns <= SMALL else QLINEAR
    if kernel != "reference" and device == "cuda" and rows % 8 == 0 and columns % 8 == 0:
        return INT_MM
    return REFERENCE


def describe(name: str) -> str:
    """The kernel's name for people and for the ledger."""
    return f"{name} (int8 activations by token)"


@cache
def qlinear_is_exact() -> bool:
    """Whether oneDNN's int8 product adds without saturation here, tried with the largest products there are."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or torch.backends.mkldnn.is_available() is False:
        return False
    a = torch.full((3, 64), 127, dtype=torch.int8)
    w = torch.full((16, 64), 127, dtype=torch.int8)
    w[1::2] = -128
    a[1], a[2, ::2] = -127, -127
    try:
        found = _qlinear(a, torch.ops.onednn.qlinear_prepack(w, None), 16)
    except RuntimeError:
        return False
    return bool(torch.equal(found.double(), a.double() @ w.double().t()))


def quantize_rows(x: Tensor, top: float = TOP) -> tuple[Tensor, Tensor]:
    """(int8 codes (tokens, in), float32 scales (tokens, 1)) of x (tokens, in). Zeros get a scale next to none."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=LEAST).div_(top)
    codes = torch.div(x, scale).round_()  # in float32, whatever the type of x
    return (codes if top <= 127 else codes.clamp_(max=127)).to(torch.int8), scale


def prepare(parts: Held, name: str) -> dict[str, Tensor]:
    """`weight` int8 (out, in) and `weight_scale` (out, 1) as the kernel `name` wants them; then drop `parts`."""
    if name == QLINEAR:
        return {"weight": torch.ops.onednn.qlinear_prepack(parts["weight"].contiguous(), None),
                "weight_scale": parts["weight_scale"]}
    return dict(parts)


def recover(held: Held, name: str) -> dict[str, Tensor]:
    """The inverse of `prepare`, exact."""
    if name == QLINEAR:
        return {"weight": held["weight"].to_dense().t().contiguous(), "weight_scale": held["weight_scale"]}
    return dict(held)


def int8_matmul(x: Tensor, held: Held, name: str, bias: Tensor | None = None, top: float = TOP) -> Tensor:
    """y (..., out) in x's type. top: what the largest of a token becomes (127.5 is what compressed-tensors takes)."""
    rows = held["weight_scale"].shape[0]
    flat = x.reshape(-1, x.shape[-1])
    if flat.shape[0] == 0:
        return x.new_zeros(*x.shape[:-1], rows)
    if name in (TRITON, OPS):
        return _ops(flat, held, bias).to(x.dtype).view(*x.shape[:-1], rows)
    codes, scale = quantize_rows(flat, top)
    y = accumulate(codes, held, name).mul_(scale).mul_(held["weight_scale"].float().view(1, -1))
    y = y if bias is None else y.add_(bias.float())
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def accumulate(codes: Tensor, held: Held, name: str) -> Tensor:
    """(tokens, out) float32: sum_k a_tk w_ok, exact as an integer and then rounded to float32."""
    rows = held["weight_scale"].shape[0]
    if name == QLINEAR:
        return _qlinear(codes, held["weight"], rows)
    if name == INT_MM:
        return _int_mm(codes, held["weight"])
    total = torch.zeros(codes.shape[0], rows, dtype=torch.float64, device=codes.device)
    for start in range(0, codes.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        total += codes[:, part].float() @ held["weight"][:, part].float().t()
    return total.float()


def on_codes(codes: Tensor, scale: Tensor, held: Held, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y (tokens, out) by the op of `llmops_kernels`, from tokens that are codes (tokens, in) and scales (tokens, 1)."""
    from llmops_kernels.int8_linear import int8_linear

    return int8_linear(codes, scale, held["weight"], held["weight_scale"].float().view(-1, 1), bias, dtype=dtype)


def _ops(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    from llmops_kernels.quantize_tokens import quantize_tokens

    codes, scale = quantize_tokens(x if x.stride(1) == 1 else x.contiguous(), torch.int8)
    return on_codes(codes, scale, held, bias, x.dtype)


@cache
def triton_here() -> bool:
    """Whether the kernels of `llmops_kernels` are installed."""
    return find_spec("triton") is not None and find_spec("llmops_kernels") is not None


def _qlinear(codes: Tensor, packed: Tensor, rows: int) -> Tensor:
    unsigned = (codes.view(torch.uint8) ^ 128).contiguous()  # a + 128
    y: Tensor = torch.ops.onednn.qlinear_pointwise(unsigned, 1.0, 128, packed, *_unit(rows), None, 1.0, 0,
                                                   torch.float32, "none", [], "")
    return y


@cache
def _unit(rows: int) -> tuple[Tensor, Tensor]:
    """Scales of 1 and zero points of 0: what the op multiplies its integers by."""
    return torch.ones(rows), torch.zeros(rows, dtype=torch.int64)


def _int_mm(codes: Tensor, weight: Tensor) -> Tensor:
    """On CUDA the op wants more than 16 rows."""
    short = max(0, 17 - codes.shape[0]) if codes.device.type == "cuda" else 0
    padded = torch.nn.functional.pad(codes, (0, 0, 0, short)) if short else codes
    return torch._int_mm(padded, weight.t())[:codes.shape[0]].float()
