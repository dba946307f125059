"""Rotation of 64 columns at a time: what makes a group's outlier everybody's burden, and so 4 bits enough for it."""

import torch

GROUP_SIZE = 64


def matrix(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(64, 64) Sylvester's Hadamard matrix over 8: symmetric, its own inverse, exact in every floating type."""
    index = torch.arange(GROUP_SIZE)
    both = index[:, None] & index[None, :]
    ones = sum(both >> bit & 1 for bit in range(GROUP_SIZE.bit_length() - 1))
    return (1 - 2 * (ones % 2)).to(dtype) / GROUP_SIZE**0.5


def rotate(values: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Multiply every group of 64 columns by the matrix; twice is the identity.

    Args:
        values: (..., K) floating point, K a multiple of 64.
        rotation: :func:`matrix`, of the values' type and on their device.

    Returns:
        (..., K) contiguous.
    """
    return torch.matmul(values.reshape(-1, GROUP_SIZE), rotation).view(values.shape)


def smooth_and_rotate(x: torch.Tensor, smooth_factor: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """What takes a rotated layer's input's place: ``x / smooth_factor``, rotated.

    In float16, what the division takes so far that a sum of 64 could leave the type's range is cut off: nothing finite
    makes NaN. The other types have range enough not to spend a pass over x on it.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        smooth_factor: (K,) of the same type, not zero.
        rotation: as for :func:`rotate`.
    """
    smoothed = x / smooth_factor
    if x.dtype == torch.float16:
        most = torch.finfo(x.dtype).max / GROUP_SIZE**0.5
        smoothed.clamp_(-most, most)
    return rotate(smoothed, rotation)
