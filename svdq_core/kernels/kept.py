"""What is made of a layer's tensors once, for every call: an image of its weight, or arguments of its kernels."""

from __future__ import annotations

import weakref
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch

from . import state_of

T = TypeVar("T")
Operands = tuple[torch.Tensor | None, ...]


class _Entry(NamedTuple, Generic[T]):
    identities: tuple[int, ...]
    states: list[tuple[int, int] | None]
    made: T
    references: list[weakref.ref]  # whose callbacks take the entry out before an identity is another tensor's


class Kept(Generic[T]):
    """Things made of tensors, each kept while all of these live and are where and what they were.

    A lookup takes about 3 us: a layer does it at every call.
    """

    _all: ClassVar[list[Kept]] = []

    def __init__(self) -> None:
        self._entries: dict[int, _Entry[T]] = {}  # by the identity of the weight
        self._all.append(self)

    @classmethod
    def forget_all(cls, weight: torch.Tensor) -> None:
        """Let go of everything that is kept for a weight, here or elsewhere."""
        for kept in cls._all:
            kept.forget(weight)

    def get(self, weight: torch.Tensor, operands: Operands) -> T | None:
        """What was made of these operands, of which ``weight`` is one; None if it was not, or they have changed."""
        entry = self._entries.get(id(weight))
        if entry is None or entry.identities != tuple(map(id, operands)) or entry.states != _states(operands):
            return None
        return entry.made

    def put(self, weight: torch.Tensor, operands: Operands, made: T) -> None:
        """Keep what was made, in the place of what was kept for this weight."""
        key = id(weight)

        def drop(reference: weakref.ref) -> None:
            entry = self._entries.get(key)
            if entry is not None and any(reference is each for each in entry.references):
                del self._entries[key]

        references = [weakref.ref(tensor, drop) for tensor in operands if tensor is not None]
        self._entries[key] = _Entry(tuple(map(id, operands)), _states(operands), made, references)

    def of(self, weight: torch.Tensor) -> T | None:
        """What is kept for a weight, whatever became of the other operands."""
        entry = self._entries.get(id(weight))
        return None if entry is None else entry.made

    def forget(self, weight: torch.Tensor) -> None:
        """Let go of what is kept for a weight."""
        self._entries.pop(id(weight), None)


def _states(operands: Operands) -> list[tuple[int, int] | None]:
    return [None if tensor is None else state_of(tensor) for tensor in operands]
