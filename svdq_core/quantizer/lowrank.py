"""The low-rank branch: the part of a weight that stays in 16 bits."""

import torch

_OVERSAMPLING = 8


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
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix.t() @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(basis.t() @ matrix, full_matrices=False)
    kept = min(rank, width)
    root = values[:kept].sqrt()
    up = torch.zeros((n, rank), device=matrix.device)
    down = torch.zeros((k, rank), device=matrix.device)
    up[:, :kept] = basis @ left[:, :kept] * root
    down[:, :kept] = right[:kept].t() * root
    return up, down
