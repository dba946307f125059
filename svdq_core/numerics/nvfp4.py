"""NVFP4: E2M1 codes in groups of 16 along K, an E4M3 scale per group, a float32 scale over all.

A code is a sign bit and the index of a magnitude::

    code  0  1    2  3    4  5  6  7        8 .. 15: the same, negative
    value 0  0.5  1  1.5  2  3  4  6

Two codes lie in a byte as :func:`.int4.pack` puts them, the even column in the low nibble.
"""

import torch

GROUP_SIZE = 16
LARGEST = 6.0
SCALE_LARGEST = 448.0  # of E4M3
SCALE_DTYPE = torch.float8_e4m3fn

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode(values: torch.Tensor) -> torch.Tensor:
    """The nearest code of each value; a tie goes to the even code, as the hardware's conversion does.

    Args:
        values: any shape, floating point, in steps; beyond +-6 it saturates.

    Returns:
        int8 codes in [0, 15], the same shape.
    """
    magnitude = values.float().abs().clamp(max=LARGEST)
    # A binade has two values: steps of 0.5 up to 2 (below 1 they are the subnormals), of 1 up to 4, of 2 up to 6.
    fine = (magnitude * 2).round()
    middle = magnitude.round() + 2
    coarse = (magnitude / 2).round() + 4
    code = torch.where(magnitude < 2, fine, torch.where(magnitude < 4, middle, coarse))
    return (code + 8 * torch.signbit(values)).to(torch.int8)


def nearest(values: torch.Tensor) -> torch.Tensor:
    """``decode(encode(values))``, in float32."""
    magnitude = values.float().abs().clamp(max=LARGEST)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).copysign(values)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of int8 codes in [0, 15], the same shape."""
    table = torch.tensor((*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)), device=codes.device)
    return table[codes.int()]


def group_scale(values: torch.Tensor, tensor_scale: torch.Tensor | float = 1.0) -> torch.Tensor:
    """(..., K / 16) E4M3 scale = absmax / 6 of each group, in units of ``tensor_scale``.

    A scale too large for E4M3 becomes its largest, 448, one below half its smallest subnormal 0.

    Args:
        values: (..., K) floating point, K a multiple of 16.
        tensor_scale: float32 scalar; 0 where all values are.

    Raises:
        ValueError: K is not a multiple of 16.
    """
    if values.shape[-1] % GROUP_SIZE:
        raise ValueError(f"K = {values.shape[-1]} is not a multiple of {GROUP_SIZE}")
    largest = values.float().unflatten(-1, (-1, GROUP_SIZE)).abs().amax(dim=-1)
    scale = largest / LARGEST / tensor_scale
    return torch.where(largest > 0, scale, 0.0).clamp(max=SCALE_LARGEST).to(SCALE_DTYPE)


def quantize_groups(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each group of 16 values to codes, as activations are at run time (tensor scale 1).

    Args:
        values: (..., K) floating point, K a multiple of 16.

    Returns:
        codes (..., K) int8 in [0, 15] and scale (..., K / 16) E4M3; the codes are nearest for the scale
        as rounded. A group that E4M3 has no scale for (absmax below 6 * 2^-10) is zero.

    Raises:
        ValueError: K is not a multiple of 16.
    """
    scale = group_scale(values)
    step = scale.float().unsqueeze(-1)
    steps = torch.where(step > 0, values.float().unflatten(-1, (-1, GROUP_SIZE)) / step, 0.0)
    return encode(steps).flatten(-2), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes' values times their group's scale.

    Args:
        codes: (..., K) int8.
        scale: (..., K / 16) E4M3.

    Returns:
        (..., K) float32.
    """
    return (decode(codes).unflatten(-1, (-1, GROUP_SIZE)) * scale.float().unsqueeze(-1)).flatten(-2)
