"""gated_activation as a Triton kernel: a program for each row and so many of its columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pagoda_kernels.launch import launch

_COLUMNS = 1024


def gated_activation_triton(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `pagoda_kernels.gated_activation.gated_activation`."""
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.is_contiguous():
        raise ValueError(
            f"gate_up is {list(gate_up.shape)}; it must be [num_tokens, 2 * size], contiguous."
        )
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    launch(
        _gated_activation_kernel,
        [num_tokens, triton.cdiv(size, _COLUMNS)],
        gate_up,
        out,
        size,
        ACTIVATION=activation,
        BLOCK=_COLUMNS,
        num_warps=4,
    )
    return out


@triton.jit
def _gated_activation_kernel(
    gate_up_ptr, out_ptr,
    size,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate_ptr = gate_up_ptr + row * 2 * size + columns
    gate = tl.load(gate_ptr, inside, 0.0).to(tl.float32)
    up = tl.load(gate_ptr + size, inside, 0.0).to(tl.float32)
    out = activate(gate, ACTIVATION) * up
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * _sigmoid(x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_pytorch_tanh")
        # (1 + tanh(u)) / 2 is sigmoid(2u); u = sqrt(2 / pi) * (x + 0.044715 x³).
        return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _sigmoid(x):
    """Of a large negative number too: exp never overflows."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, small, 1.0) / (1.0 + small)
