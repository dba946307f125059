"""The low-rank branch: the part of a weight that stays in 16 bits."""

import torch

_OVERSAMPLING = 8
_EPSILON = 1e-14  # relative, of a squared float64 quantity


def truncated_svd(
    matrix: torch.Tensor, rank: int, generator: torch.Generator, power_iterations: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of rank ``rank``, by randomized subspace iteration.

    Halko, Martinsson, Tropp (2011), algorithm 4.4. A weight's leading singular values stand out, so a
    few iterations give the truncated SVD to well below the precision of the 16-bit factors.

    Args:
        matrix: (N, K) float32.
        rank: columns of the factors; 0 gives empty factors.
        generator: on the CPU, so that every device draws the same start.
        power_iterations: passes over the matrix and back.

    Returns:
        up (N, rank) and down (K, rank) with ``matrix ~ up @ down.T``; the singular values are shared
        evenly between the two, which keeps both inside 16-bit range.
    """
    n, k = matrix.shape
    if rank == 0:
        return matrix.new_empty((n, 0)), matrix.new_empty((k, 0))
    width = min(rank + _OVERSAMPLING, n, k)
    start = torch.randn((k, width), generator=generator).to(matrix.device)
    basis = _orthonormal(matrix @ start)
    for _ in range(power_iterations):
        basis = _orthonormal(matrix @ (matrix.t() @ basis))
    inside = (basis.t() @ matrix).double()  # (width, K): the matrix as the basis sees it
    squares, left = torch.linalg.eigh(inside @ inside.t())
    kept = min(rank, width)
    squares, left = squares.flip(0)[:kept].clamp(min=0), left.flip(1)[:, :kept]
    root = squares**0.25  # of the singular values
    inverse_root = torch.where(squares > _EPSILON * squares[0], 1 / root, 0.0)
    up = torch.zeros((n, rank), device=matrix.device)
    down = torch.zeros((k, rank), device=matrix.device)
    up[:, :kept] = basis @ (left * root).float()
    down[:, :kept] = (inside.t() @ (left * inverse_root)).float()
    return up, down


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """(N, w) orthonormal columns with the span of ``vectors``; dependent ones become zero.

    By the Gram matrix in float64: products and one small eigenproblem, where a Householder QR of so
    tall a matrix is a long chain of tiny steps, slow on a GPU and on a busy CPU.
    """
    for _ in range(2):  # the second pass makes up for the squared condition of the first
        vectors = vectors.double()
        squares, directions = torch.linalg.eigh(vectors.t() @ vectors)
        inverse = torch.where(squares > _EPSILON * squares[-1], squares.clamp(min=0).rsqrt(), 0.0)
        vectors = vectors @ (directions * inverse)
    return vectors.float()
