"""The low-rank branch: the part of a weight that stays in 16 bits."""

import torch

_OVERSAMPLING = 8
_EPSILON = 1e-14  # relative, of a squared float64 quantity


def truncated_svd(
    matrix: torch.Tensor,
    rank: int,
    generator: torch.Generator,
    metric: torch.Tensor | None = None,
    power_iterations: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Best approximation of rank ``rank``, by randomized subspace iteration.

    Halko, Martinsson, Tropp (2011), algorithm 4.4. A weight's leading singular values stand out, so a
    few iterations give the truncated SVD to well below the precision of the 16-bit factors.

    In a metric S over the columns, tr (M - A) S (M - A)^T is least for ``A = U U^T M``, with U the leading
    eigenvectors of ``M S M^T``: the metric never needs a root or an inverse.

    Args:
        matrix: (N, K) float32.
        rank: columns of the factors; 0 gives empty factors.
        generator: on the CPU, so that every device draws the same start.
        metric: (K, K) float32, positive semidefinite, or its diagonal (K,); None for the plain SVD.
        power_iterations: passes over the matrix and back.

    Returns:
        up (N, rank) and down (K, rank) with ``matrix ~ up @ down.T``; each pair of columns has the same norm
        in both, which keeps them inside 16-bit range.
    """
    n, k = matrix.shape
    if rank == 0:
        return matrix.new_empty((n, 0)), matrix.new_empty((k, 0))
    width = min(rank + _OVERSAMPLING, n, k)
    start = torch.randn((k, width), generator=generator).to(matrix.device)
    basis = _orthonormal(matrix @ _times(metric, start))
    for _ in range(power_iterations):
        basis = _orthonormal(matrix @ _times(metric, matrix.t() @ basis))
    inside = matrix.t() @ basis  # (K, width): the matrix as the basis sees it
    left = _eigen(inside.double().t() @ _times(metric, inside).double())[1].float()
    kept = min(rank, width)
    left = left.flip(1)[:, :kept]
    down_kept = inside @ left
    root = down_kept.norm(dim=0).sqrt()
    # Directions that hold nothing but float32 noise would be blown up by the division.
    inverse_root = torch.where(root > _EPSILON**0.25 * root.amax(), 1 / root, 0.0)
    up = torch.zeros((n, rank), device=matrix.device)
    down = torch.zeros((k, rank), device=matrix.device)
    up[:, :kept] = basis @ (left * root)
    down[:, :kept] = down_kept * inverse_root
    return up, down


def _times(metric: torch.Tensor | None, columns: torch.Tensor) -> torch.Tensor:
    if metric is None:
        return columns
    return metric[:, None] * columns if metric.dim() == 1 else metric @ columns


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """(N, w) orthonormal columns with the span of ``vectors``; dependent ones become zero.

    By the Gram matrix in float64: products and one small eigenproblem, where a Householder QR of so
    tall a matrix is a long chain of tiny steps, slow on a GPU and on a busy CPU.
    """
    for _ in range(2):  # the second pass makes up for the squared condition of the first
        vectors = vectors.double()
        squares, directions = _eigen(vectors.t() @ vectors)
        inverse = torch.where(squares > _EPSILON * squares[-1], squares.clamp(min=0).rsqrt(), 0.0)
        vectors = vectors @ (directions * inverse)
    return vectors.float()


def _eigen(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of a small symmetric matrix, on the CPU: a GPU takes several times as long."""
    values, vectors = torch.linalg.eigh(matrix.cpu())
    return values.to(matrix.device), vectors.to(matrix.device)
