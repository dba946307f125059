"""A whole layer made ready once: operands checked, kernels found, arguments that do not change laid out.

A model of many small layers (SDXL has 700) takes as long to launch as to run. Checks of operands that never change,
and tensors that nobody but the next kernel sees, would be most of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch

from .kept import Kept, Operands
from .launch import on

_ALIGNMENT = 16  # bytes
MOST_SIZES = 32  # numbers of rows that a layer keeps launches for


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
        x: (M, K), checked: an input of the layer.
        n: outputs.
    """

    def __init__(self, x: torch.Tensor, n: int):
        self.dtype, self.index = x.dtype, x.get_device()
        self.n, self.k = n, x.shape[1]
        self._launches: dict[int, Launches] = {}

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
                launches = self._launches.get(m)
                if launches is None:
                    if len(self._launches) >= MOST_SIZES:
                        self._launches.clear()
                    launches = self._launches[m] = self.prepare(m)
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


def places(*sizes: int) -> list[int]:
    """Where pieces of so many bytes begin, one after another on 16-byte boundaries; and where they end."""
    return list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
