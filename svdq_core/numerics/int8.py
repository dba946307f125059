"""INT8 codes in [-127, 127] with one scale per row: absmax / 127."""

import torch

LARGEST = 127


def quantize_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to 8-bit codes, scaled by the row's largest value.

    Args:
        values: (..., K) floating point.

    Returns:
        codes (..., K) int8 and scale (..., 1) float32; an all-zero row has scale 0.
    """
    values = values.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    # Below float32's smallest normal the reciprocal overflows; such a row is zero for all purposes.
    inverse = torch.where(largest > torch.finfo(torch.float32).tiny * LARGEST, LARGEST / largest, 0.0)
    codes = (values * inverse).round().clamp(-LARGEST, LARGEST)
    return codes.to(torch.int8), torch.where(inverse > 0, largest / LARGEST, 0.0)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(..., K) float32 of int8 codes and their rows' scales (..., 1)."""
    return codes.float() * scale.float()
