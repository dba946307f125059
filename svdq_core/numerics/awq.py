"""Asymmetric 4-bit weights in groups of 64 along K, as ``awq_w4a16`` files keep them.

``w = (code - 8) * scale + zero``, code in [0, 15]: a group's values span [zero - 8 scale, zero + 7 scale].
Packed as :func:`.int4.pack` does.
"""

import torch

GROUP_SIZE = 64
_CENTRE, _STEPS = 8, 15


def group_range(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of each group, from its least and largest weight.

    Args:
        weight: (N, K) float32, K a multiple of 64.
        dtype: 16-bit type that the file keeps both in.

    Returns:
        scale and zero, (N, K / 64) of ``dtype``; a group of equal weights has scale 0.

    Raises:
        ValueError: K is not a multiple of 64.
    """
    if weight.shape[-1] % GROUP_SIZE:
        raise ValueError(f"K = {weight.shape[-1]} is not a multiple of {GROUP_SIZE}")
    low, high = weight.unflatten(-1, (-1, GROUP_SIZE)).aminmax(dim=-1)
    scale = (high / _STEPS - low / _STEPS).to(dtype)
    return scale, (low + _CENTRE * scale.float()).to(dtype)


def encode(steps: torch.Tensor) -> torch.Tensor:
    """int8 codes in [0, 15] nearest to values given as (w - zero) / scale."""
    return (steps + _CENTRE).round().clamp(0, _STEPS).to(torch.int8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 (w - zero) / scale of codes."""
    return codes.float() - _CENTRE


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """(N, K) float32 of int8 codes (N, K), scale and zero (N, K / 64)."""
    steps = decode(codes).unflatten(-1, (-1, GROUP_SIZE))
    return (steps * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)).flatten(-2)
