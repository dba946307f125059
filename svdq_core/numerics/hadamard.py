"""Rotation of 64 columns at a time: what makes a group's outlier everybody's burden, and so 4 bits enough for it."""

from functools import lru_cache

import torch

GROUP_SIZE = 64


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # it is kept, and may be wanted outside of that mode
def matrix(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """(64, 64) Sylvester's Hadamard matrix over 8: symmetric, its own inverse, exact in every floating type."""
    index = torch.arange(GROUP_SIZE, device=device)
    both = index[:, None] & index[None, :]
    ones = sum(both >> bit & 1 for bit in range(GROUP_SIZE.bit_length() - 1))
    return (1 - 2 * (ones % 2)).to(dtype) / GROUP_SIZE**0.5


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Multiply every group of 64 columns by the matrix; twice is the identity.

    Args:
        values: (..., K) floating point, K a multiple of 64.

    Returns:
        (..., K) contiguous.
    """
    return torch.matmul(values.reshape(-1, GROUP_SIZE), matrix(values.dtype, values.device)).view(values.shape)


def smooth_and_rotate(x: torch.Tensor, smooth_factor: torch.Tensor) -> torch.Tensor:
    """What a rotated layer quantizes: ``x / smooth_factor`` in x's type, rotated.

    Kernels rotate by products of 16-bit numbers, so that is what the smoothed input is rounded to; beyond the type's
    range it is cut off, and nothing finite makes NaN.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        smooth_factor: (K,) of the same type, not zero.

    Returns:
        (M, K) float32.
    """
    most = torch.finfo(x.dtype).max
    smoothed = (x.float() / smooth_factor.float()).clamp(-most, most).to(x.dtype).float()
    most = torch.finfo(torch.float32).max
    return (rotate(smoothed / GROUP_SIZE) * GROUP_SIZE).clamp(-most, most)
