"""Rounding a residual weight to codes, group by group along K."""

import torch

from .codecs import Codec

_BLOCK = 64  # columns whose errors are pushed on together
_CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's largest value


def round_to_nearest(weight: torch.Tensor, codec: Codec, step: torch.Tensor) -> torch.Tensor:
    """(N, K) int8 codes, each weight to its nearest step.

    Args:
        weight: (N, K) float32, offset taken off.
        codec: of the layer's format.
        step: (N, groups) float32, as stored; where it is 0 the codes are those of 0.
    """
    groups, step = weight.unflatten(-1, (step.shape[1], -1)), step.unsqueeze(-1)
    return codec.encode(torch.where(step > 0, groups / step, 0.0)).flatten(-2)


def dequantize(codes: torch.Tensor, codec: Codec, step: torch.Tensor) -> torch.Tensor:
    """(N, K) float32 that codes stand for, without offset."""
    return (codec.decode(codes).unflatten(-1, (step.shape[1], -1)) * step.unsqueeze(-1)).flatten(-2)


def clipped_scales(
    weight: torch.Tensor, codec: Codec, dtype: torch.dtype, power: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Scales that clip a group's largest weights where the other weights gain more than those lose.

    Args:
        weight: (N, K) float32, offset taken off.
        codec: of the layer's format.
        dtype: 16-bit type of the file.
        power: (K,) what each column's squared error weighs.
    """
    for reach in _CLIPPING:
        step = codec.step(codec.scales(weight, dtype, reach))
        wrong = dequantize(round_to_nearest(weight, codec, step), codec, step).sub_(weight).square_().mul_(power)
        error = wrong.unflatten(-1, (step.shape[1], -1)).sum(dim=-1)
        if reach == 1.0:
            least, best = error, torch.ones_like(error)
        else:
            best = torch.where(error < least, reach, best)
            least = torch.minimum(error, least)
    return codec.scales(weight, dtype, best)


def gptq(weight: torch.Tensor, codec: Codec, step: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """(N, K) int8 codes that keep the layer's output close, not each weight (GPTQ, arXiv 2210.17323).

    Columns are rounded one after the other; each one's error is pushed onto the columns still to come,
    in proportion to how they go together in the inputs.

    Args:
        weight, codec, step: as for :func:`round_to_nearest`.
        spread: (K, K) float32, upper triangular, of :meth:`~.moments.InputMoments.spread`.
    """
    (n, k), groups = weight.shape, step.shape[1]
    inverse_step = torch.where(step > 0, 1 / step, 0.0).t().contiguous()
    step = step.t().contiguous()
    rest = weight.t().clone(memory_format=torch.contiguous_format)  # a column lies in one piece
    codes = torch.empty(rest.shape, dtype=torch.int8, device=weight.device)
    columns = _Columns(codec, n, max(1, _BLOCK * groups // k), weight.device)
    for start in range(0, k, _BLOCK):
        stop = start + _BLOCK
        row = start * groups // k
        columns.block.copy_(rest[start:stop])
        columns.step.copy_(step[row : row + len(columns.step)])
        columns.inverse_step.copy_(inverse_step[row : row + len(columns.step)])
        torch.div(spread[start:stop, start:stop], spread.diagonal()[start:stop, None], out=columns.onto)
        columns.round()
        codes[start:stop] = codec.encode(columns.nearest)
        onto = spread[start:stop, stop:] / spread.diagonal()[start:stop, None]
        rest[stop:].addmm_(onto.t(), columns.errors, alpha=-1)
    return codes.t().contiguous()


class _Columns:
    """A block of columns, rounded one after the other.

    That is hundreds of operations on next to nothing: on CUDA they are recorded once as a graph.

    Attributes:
        block: (64, N) what is to be rounded; changed by it.
        step, inverse_step: (groups, N) of the block's groups.
        onto: (64, 64) how a column's error is pushed onto those after it.
        nearest: (64, N) the results, in steps.
        errors: (64, N) what they are off by.
    """

    def __init__(self, codec: Codec, n: int, groups: int, device: torch.device):
        self._codec = codec
        self.block, self.nearest, self.errors = (torch.zeros((_BLOCK, n), device=device) for _ in range(3))
        self.step, self.inverse_step = (torch.zeros((groups, n), device=device) for _ in range(2))
        self.onto = torch.zeros((_BLOCK, _BLOCK), device=device)
        self.round = self._round
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._round()
            self.round = graph.replay

    def _round(self) -> None:
        for j in range(_BLOCK):
            row = j * len(self.step) // _BLOCK
            self._codec.round_(torch.mul(self.block[j], self.inverse_step[row], out=self.nearest[j]))
            torch.addcmul(self.block[j], self.nearest[j], self.step[row], value=-1, out=self.errors[j])
            self.block[j + 1 :].addr_(self.onto[j, j + 1 :], self.errors[j], alpha=-1)
