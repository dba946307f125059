"""A change of a weight as a product of two thin matrices: fitted under an error bound, or made thinner."""

import torch

from ..layers import Adapter
from ..quantizer.lowrank import truncated_svd

_FIRST_RANK = 16


def fit(delta: torch.Tensor, error_bound: float, max_rank: int) -> Adapter:
    """The lowest rank that a dense change can be told in, or the change itself.

    Args:
        delta: (N, K) float32.
        error_bound: of the Frobenius norm of what is left out, relative to that of ``delta``.
        max_rank: no higher one is tried, nor one whose factors are larger than ``delta``.

    Returns:
        Factors within the bound, or an adapter of rank 0 with ``delta`` where no rank is low enough.
    """
    n, k = delta.shape
    empty = delta.new_empty((k, 0)), delta.new_empty((n, 0))
    size = torch.linalg.norm(delta)
    if not bool(size):
        return Adapter(*empty)
    highest = min(max_rank, n * k // (n + k))
    rank = min(_FIRST_RANK, highest)
    while rank:
        up, down = truncated_svd(delta, rank, torch.Generator().manual_seed(0))
        if torch.linalg.norm(delta - up @ down.t()) <= error_bound * size:
            return Adapter(*_shortest(down, up, delta, error_bound * size))
        if rank == highest:
            break
        rank = min(2 * rank, highest)
    return Adapter(*empty, delta=delta)


def _shortest(
    down: torch.Tensor, up: torch.Tensor, delta: torch.Tensor, room: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors without their last columns (the least singular values), as far as the room allows."""
    values = torch.linalg.norm(up, dim=0) * torch.linalg.norm(down, dim=0)
    left_out = torch.linalg.norm(delta) ** 2 - values.square().cumsum(0)  # after each rank
    fits = (left_out <= room.square()).nonzero()
    rank = int(fits[0]) + 1 if len(fits) else up.shape[1]
    while torch.linalg.norm(delta - up[:, :rank] @ down[:, :rank].t()) > room:  # rounding near the bound
        rank += 1
    return down[:, :rank], up[:, :rank]


def recompress(down: torch.Tensor, up: torch.Tensor, error: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of lower rank with nearly the same product, e.g. of several LoRAs that share directions.

    Args:
        down: (K, r) and
        up: (N, r) float32, of any rank.
        error: allowed, relative to the product's Frobenius norm.

    Returns:
        (K, s) and (N, s), s <= r the least within the error: by the SVD of the small matrix between
        orthonormal bases of the factors, without ever forming the (N, K) product.
    """
    if not up.shape[1]:
        return down, up
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down)
    a, values, b = torch.linalg.svd(left_core @ right_core.t())
    tail = values.square().flip(0).cumsum(0).flip(0)  # what is left out if this one is
    rank = int((tail > error**2 * tail[0]).sum())
    root = values[:rank].sqrt()
    return right @ (b[:rank].t() * root), left @ (a[:, :rank] * root)
