"""A text encoder without weights: every word is a fixed pseudo-random vector.

The demo model was trained with it. It is a bag of words and word pairs that knows which word stands where, and it
gives the same numbers on every machine: the vectors are bytes of SHAKE-256, not draws of a random generator.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

import torch

TOKENS = 16
CONTEXT_DIM = 512
POOLED_DIM = 768

_IGNORED = {"a", "an", "the"}
_BYTE_STD = ((256**2 - 1) / 12) ** 0.5  # of a uniformly distributed byte


@lru_cache(maxsize=16384)
def _vector(text: str, dim: int) -> torch.Tensor:
    """The unit-variance vector of a piece of text."""
    data = bytearray(hashlib.shake_256(text.encode()).digest(dim))
    return (torch.frombuffer(data, dtype=torch.uint8).float() - 127.5) / _BYTE_STD


def words(text: str) -> list[str]:
    """The words that are encoded: lower-case letters and digits, articles left out."""
    found = re.findall(r"[a-z0-9]+", text.lower())
    return [word for word in found if word not in _IGNORED][:TOKENS]


def encode(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (TOKENS, CONTEXT_DIM) and pooled vector (POOLED_DIM,) of a prompt, float32.

    A token is its word, half its pair with the word before, and half its place. Places after the last word are zero,
    and so is the whole encoding of an empty prompt.
    """
    context = torch.zeros(TOKENS, CONTEXT_DIM)
    pooled = torch.zeros(POOLED_DIM)
    before = ""
    for place, word in enumerate(words(text)):
        pair = f"{before} {word}"
        context[place] = (
            _vector(word, CONTEXT_DIM) + 0.5 * _vector(pair, CONTEXT_DIM) + 0.5 * _vector(f"#{place}", CONTEXT_DIM)
        )
        pooled += _vector(word, POOLED_DIM) + 0.5 * _vector(pair, POOLED_DIM)
        before = word
    return context, pooled / max(1, len(words(text))) ** 0.5
