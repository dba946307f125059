"""A whole layer made ready once: operands checked, kernels found, arguments that do not change laid out.

A model of many small layers (SDXL has 700) takes as long to launch as to run. Checks of operands that never change,
and tensors that nobody but the next kernel sees, would be most of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple, TypeVar

import torch

from .kept import Kept, Operands
from .launch import on, pad_rank, pointer

_ALIGNMENT = 16  # bytes
MOST_SIZES = 32  # numbers of rows that a layer keeps launches for

S, L = TypeVar("S"), TypeVar("L")


class Launches(NamedTuple):
    """What a layer launches for inputs with so many rows. All operands are addresses.

    Attributes:
        quantize: the first half: (stream, x, codes, their scales, ``down``, its scales or 0, rest).
        multiply: the second: (stream, codes, their scales, ``down``, its scales or 0, outputs).
        scale, down, down_scale, rest: where these begin behind the codes; down_scale is None if there are none.
        room: bytes of all of them.
    """

    quantize: Callable[..., None]
    multiply: Callable[..., None]
    scale: int
    down: int
    down_scale: int | None
    rest: int
    room: int

    @classmethod
    def laid_out(
        cls,
        quantize: Callable[..., None],
        multiply: Callable[..., None],
        codes: int,
        scale: int,
        down: int,
        down_scale: int = 0,
        rest: int = 0,
    ) -> Launches:
        """With so many bytes for what passes from one half to the other, and for the rest."""
        sizes = codes, scale, down, down_scale, rest
        _, at_scale, at_down, at_down_scale, at_rest, room = places(*sizes)
        return cls(quantize, multiply, at_scale, at_down, at_down_scale if down_scale else None, at_rest, room)

    def start(self, stream: int, x: int, between: int, out: int) -> None:
        """Start both halves, given where the input, ``room`` bytes and the outputs are."""
        down_scale = 0 if self.down_scale is None else between + self.down_scale
        quantized = between, between + self.scale, between + self.down, down_scale
        self.quantize(stream, x, *quantized, between + self.rest)
        self.multiply(stream, *quantized, out)


class ReadyLayer(ABC):
    """A layer whose operands have been checked, with what it launches for each number of rows.

    Args:
        x: (M, K): an input of the layer.
        smooth_factor, proj_down: its operands, and
        of_output: of its second half, as the kernel has them; the last two are proj_up and the bias, or None.

    Attributes:
        of_input, of_output: where they are, both factors of the low-rank branch with
        rank: a multiple of 8.

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """

    def __init__(
        self,
        x: torch.Tensor,
        smooth_factor: torch.Tensor,
        proj_down: torch.Tensor,
        *of_output: torch.Tensor | None,
    ):
        self.check(x, smooth_factor, proj_down, *of_output)
        *weights, proj_up, bias = of_output
        self.dtype, self.index = x.dtype, x.get_device()
        self.n, self.k = len(proj_up), x.shape[1]
        self._padded = pad_rank(proj_down), pad_rank(proj_up)  # copies, if they are any, live as long as this
        down, up = self._padded
        self.rank = down.shape[1]
        self.of_input = smooth_factor.data_ptr(), down.data_ptr()
        self.of_output = *map(pointer, weights), up.data_ptr(), pointer(bias)
        self._launches: dict[int, Launches] = {}

    @staticmethod
    @abstractmethod
    def check(x: torch.Tensor, *operands: torch.Tensor | None) -> None:
        """Raise unless the kernels take these.

        Raises:
            KernelInputError: they do not.
        """

    @abstractmethod
    def prepare(self, m: int) -> Launches:
        """What to launch for m rows, on the current device.

        Raises:
            KernelInputError: so many are beyond the kernels' limits.
        """

    def takes(self, x: torch.Tensor) -> bool:
        """Whether an input is like the one that this was made with, but for the number of its rows."""
        return (
            x.dtype == self.dtype
            and x.dim() == 2
            and x.shape[1] == self.k
            and x.get_device() == self.index
            and x.is_contiguous()
            and not x.data_ptr() % _ALIGNMENT
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(M, K) of which :meth:`takes` is true -> (M, N)."""
        m = x.shape[0]
        out = torch.empty((m, self.n), dtype=x.dtype, device=x.device)
        if m:
            with on(self.index):
                launches = self._launches.get(m) or keep(self._launches, m, self.prepare(m))
                between = torch.empty(launches.room, dtype=torch.int8, device=x.device)
                stream = torch._C._cuda_getCurrentRawStream(self.index)
                launches.start(stream, x.data_ptr(), between.data_ptr(), out.data_ptr())
        return out


def evaluate(
    kept: Kept[ReadyLayer], make: Callable[..., ReadyLayer], x: torch.Tensor, weight: torch.Tensor, operands: Operands
) -> torch.Tensor:
    """A layer's outputs (M, N), of what is kept of it, or what ``make(x, *operands)`` checks and makes.

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    layer = kept.get(weight, operands)
    if layer is None or not layer.takes(x):
        layer = make(x, *operands)
        if not torch.cuda.is_current_stream_capturing():  # else copies that it made belong to the graph
            kept.put(weight, operands, layer)
    return layer(x)


def keep(launches: dict[S, L], size: S, made: L) -> L:
    """Keep what a layer launches for inputs of a size, if need be instead of what it does for others."""
    if len(launches) >= MOST_SIZES:
        launches.clear()
    launches[size] = made
    return made


def places(*sizes: int) -> list[int]:
    """Where pieces of so many bytes begin, one after another on 16-byte boundaries; and where they end."""
    return list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
