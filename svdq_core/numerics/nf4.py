"""NF4: 4-bit weights at the quantiles of a normal distribution, in blocks of 64 along K.

QLoRA (Dettmers et al., arXiv 2305.14314, appendix E): a weight is ``CODEBOOK[code] * absmax`` of its block.
Packed as :func:`.int4.pack` does.
"""

import torch

GROUP_SIZE = 64
CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def group_absmax(weight: torch.Tensor) -> torch.Tensor:
    """(..., K / 64) float32 absmax of each block of a weight (..., K).

    Raises:
        ValueError: K is not a multiple of 64.
    """
    if weight.shape[-1] % GROUP_SIZE:
        raise ValueError(f"K = {weight.shape[-1]} is not a multiple of {GROUP_SIZE}")
    return weight.float().unflatten(-1, (-1, GROUP_SIZE)).abs().amax(dim=-1)


def encode(shares: torch.Tensor) -> torch.Tensor:
    """int8 codes in [0, 15] nearest to float32 shares of their block's absmax, in [-1, 1]."""
    table = torch.tensor(CODEBOOK, device=shares.device)
    return torch.bucketize(shares.contiguous(), (table[1:] + table[:-1]) / 2).to(torch.int8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """float32 shares of int8 codes."""
    return torch.tensor(CODEBOOK, device=codes.device)[codes.int()]


def dequantize(codes: torch.Tensor, absmax: torch.Tensor) -> torch.Tensor:
    """(..., K) float32 of int8 codes (..., K) and their blocks' absmax (..., K / 64)."""
    return (decode(codes).unflatten(-1, (-1, GROUP_SIZE)) * absmax.float().unsqueeze(-1)).flatten(-2)
