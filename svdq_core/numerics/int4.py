"""INT4 codes in groups of 64 along K, packed two to a byte.

Layout of a packed row (Comfy-Org ``svdquant_w4a4``, natural order)::

    column   0    1    2    3            byte j = code[2j] | code[2j + 1] << 4
    byte    |-- 0 --| |-- 1 --| ...      low nibble = even column

Signed codes are two's complement nibbles in [-7, 7] with scale = absmax / 7; unsigned codes lie in
[0, 15] with scale = max / 15 (SVDQuant section 4.2; unsigned follows Nunchaku's files).

A weight's scales are any numbers; those that this package's quantizer stores lie on a grid: in every output
channel each is a whole number of steps, up to 16, of the channel's unit. Codes times steps are then int8
values that need one scale for a channel (QServe, arXiv 2405.04532, has scales on two levels likewise).
"""

import torch

GROUP_SIZE = 64
SIGNED_MAX = 7
UNSIGNED_MAX = 15
MOST_STEPS = 16  # of a weight's scale

# Added to a GELU's output before unsigned quantization: GELU is never below -0.17.
GELU_SHIFT = 0.171875


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes two to a byte.

    Args:
        codes: (..., K) integer codes in [-8, 15]; only the low four bits are kept. K must be even.

    Returns:
        (..., K / 2) int8.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"pack needs an even last dimension, got {tuple(codes.shape)}")
    nibbles = codes.to(torch.uint8) & 0x0F
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).view(torch.int8)


def unpack(packed: torch.Tensor, unsigned: bool = False) -> torch.Tensor:
    """Inverse of :func:`pack`.

    Args:
        packed: (..., K / 2) int8.
        unsigned: read nibbles as [0, 15] instead of two's complement [-8, 7].

    Returns:
        (..., K) int8 codes.
    """
    as_bytes = packed.view(torch.uint8)
    codes = torch.stack((as_bytes & 0x0F, as_bytes >> 4), dim=-1).flatten(-2)
    if unsigned:
        return codes.view(torch.int8)
    # Moving the nibble to the top of an int8 and back extends its sign.
    return (codes << 4).view(torch.int8) >> 4


def quantize_groups(values: torch.Tensor, unsigned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each group of 64 values to 4-bit codes, scaled by the group's largest value.

    Args:
        values: (..., K) floating point, K a multiple of 64.
        unsigned: codes in [0, 15] (negative values become 0) instead of [-7, 7].

    Returns:
        codes (..., K) int8 and scale (..., K / 64) float32; an all-zero group has scale 0.

    Raises:
        ValueError: K is not a multiple of 64.
    """
    if values.shape[-1] % GROUP_SIZE:
        raise ValueError(f"K = {values.shape[-1]} is not a multiple of {GROUP_SIZE}")
    groups = values.float().unflatten(-1, (-1, GROUP_SIZE))
    largest = (groups if unsigned else groups.abs()).amax(dim=-1).clamp(min=0)
    limit = UNSIGNED_MAX if unsigned else SIGNED_MAX
    scale = largest / limit
    # Below float32's smallest normal the reciprocal overflows; such a group is zero for all purposes.
    inverse = torch.where(largest > torch.finfo(torch.float32).tiny * limit, limit / largest, 0.0)
    codes = (groups * inverse.unsqueeze(-1)).round().clamp(0 if unsigned else -limit, limit)
    return codes.to(torch.int8).flatten(-2), torch.where(inverse > 0, scale, 0.0)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes times their group's scale.

    Args:
        codes: (..., K) int8.
        scale: (..., K / 64) floating point.

    Returns:
        (..., K) float32.
    """
    groups = codes.unflatten(-1, (-1, GROUP_SIZE)).float()
    return (groups * scale.float().unsqueeze(-1)).flatten(-2)


def scale_unit(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The finest unit of which ``MOST_STEPS`` reach a scale.

    It has four significant bits, so that up to 16 of them are exact in bfloat16.

    Args:
        largest: (N,) float32, the largest scale of each output channel.
        dtype: 16-bit type of the scales.

    Returns:
        (N,) float32; 0 where ``largest`` is.
    """
    info = torch.finfo(dtype)
    fraction = largest / MOST_STEPS
    quantum = torch.ldexp(torch.ones_like(fraction), torch.frexp(fraction).exponent - 4)
    quantum = quantum.clamp_min(info.tiny * info.eps)
    return (fraction / quantum).ceil() * quantum


def scale_grid(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The grid that a weight's scales lie on.

    Args:
        scale: (K / 64, N) in 16 bits.

    Returns:
        unit (N,) float32 and steps (K / 64, N) int8 with ``steps * unit == scale`` exactly, or None where there are
        no such of at most ``MOST_STEPS``.
    """
    scale = scale.float()
    largest = scale.abs().amax(dim=0)
    unit, missing = torch.ones_like(largest), largest > 0
    for most in range(MOST_STEPS, 0, -1):
        # By a tensor: CUDA multiplies with a number's reciprocal, which is not exact.
        candidate = torch.where(missing, largest / torch.full_like(largest, most), unit)
        found = ((scale / candidate).round() * candidate == scale).all(dim=0)
        unit = torch.where(missing & found, candidate, unit)
        missing = missing & ~found
    if bool(missing.any()):
        return None
    return unit, (scale / unit).round().to(torch.int8)
