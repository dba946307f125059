"""A whole INT4 layer in the kernels of Turing to Ada: ``csrc/quantize_int4.cu``, then ``csrc/gemm_int4.cu``."""

from __future__ import annotations

from functools import partial

import torch

from . import plan
from .kept import Kept
from .launch import (
    GEMM,
    QUANTIZE,
    check_int4_layer,
    check_limits,
    gemm_kernel,
    quantize_kernel,
)
from .ready import Launches, ReadyLayer, evaluate

_NAME = "linear_w4a4"
# What the kernels are told of what a plain layer does not have, in the order of their arguments.
_NO_MODULATION = 0, 0, 1
_NO_IMAGE = 0, 0
_NO_GELU = 0, 0, 0
_NO_NEXT_LAYER = 0, 0, 0, 0, 0, 0
_NO_NORM = 0, 0, 0, 0, 0.0, 0


class _Layer(ReadyLayer):
    def __init__(self, x: torch.Tensor, *operands: torch.Tensor | None, unsigned: bool, rotated: bool):
        super().__init__(x, *operands)
        self.unsigned, self.prologue = unsigned, plan.ROTATE if rotated else plan.PLAIN

    @staticmethod
    def check(x: torch.Tensor, *operands: torch.Tensor | None) -> None:
        check_int4_layer(_NAME, x, *operands)

    def prepare(self, m: int) -> Launches:
        k, n, rank, bf16 = self.k, self.n, self.rank, self.dtype == torch.bfloat16
        check_limits(_NAME, m, n, k)
        quantizer, shape = quantize_kernel(self.index, m, k, rank, bf16, self.unsigned, self.prologue, plan.NIBBLES)
        gemm = gemm_kernel(self.index, m, n, bf16, self.unsigned, plan.STORE)
        of_input, of_output = self.of_input, self.of_output
        sizes = m, k, rank, shape.eights, shape.longer, shape.own_groups
        quantizer_sizes = *sizes, *_NO_MODULATION, m, *_NO_IMAGE, *_NO_GELU
        gemm_sizes = m, n, k, rank, *_NO_NEXT_LAYER, *_NO_NORM

        def quantize(stream: int, x: int, codes: int, scale: int, down: int, *_: int) -> None:
            quantizer.launch(stream, QUANTIZE.pack(x, *of_input, codes, scale, down, *quantizer_sizes))

        def multiply(stream: int, codes: int, scale: int, down: int, _: int, out: int) -> None:
            gemm.launch(stream, GEMM.pack(codes, scale, down, *of_output, out, *gemm_sizes))

        groups = k // plan.GROUP
        return Launches.laid_out(quantize, multiply, codes=m * k // 2, scale=4 * m * groups, down=4 * m * rank)


# By the operator's flags, of which a weight has one kind: what is kept, and what makes it.
_FORMS: dict[tuple[bool, bool], tuple[Kept[_Layer], partial[_Layer]]] = {
    (unsigned, rotated): (Kept(), partial(_Layer, unsigned=unsigned, rotated=rotated))
    for unsigned in (False, True)
    for rotated in (False, True)
}


def linear(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    act_unsigned: bool,
    act_rotated: bool = False,
) -> torch.Tensor:
    """``svdq::linear_w4a4``.

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    operands = smooth_factor, proj_down, weight, weight_scale, proj_up, bias
    kept, make = _FORMS[bool(act_unsigned), bool(act_rotated)]
    return evaluate(kept, make, x, weight, operands)
