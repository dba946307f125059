"""Batches of pictures with prompts: drawings, slightly moved, on a plain background."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUNDS = {
    "": (255, 255, 255),
    "grey": (176, 182, 190),
    "black": (28, 28, 34),
    "red": (236, 132, 124),
    "orange": (255, 190, 120),
    "yellow": (255, 236, 150),
    "green": (170, 218, 160),
    "blue": (150, 200, 242),
    "purple": (196, 170, 232),
    "pink": (255, 196, 214),
}
SMALLEST = 0.85


class Pictures:
    """The drawings on a device."""

    def __init__(self, file: Path, device: torch.device) -> None:
        data = np.load(file)
        rgba = torch.from_numpy(data["rgba"]).to(device).permute(0, 3, 1, 2).float() / 255
        self.drawings = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], dim=1)
        self.names: list[str] = data["names"].tolist()
        self.mirror = torch.from_numpy(data["mirror"]).to(device)
        self.palette = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
        self.device = device

    def compose(self, which: Tensor, colours: Tensor) -> Tensor:
        """Drawings `which` (B,), randomly mirrored, scaled and shifted, on `colours` (B, 3): (B, 3, H, W)."""
        count = len(which)
        size = SMALLEST + (1 - SMALLEST) * torch.rand(count, device=self.device)
        room = (1 - size)[:, None] * (2 * torch.rand(count, 2, device=self.device) - 1)
        flip = 1 - 2 * (self.mirror[which] & (torch.rand(count, device=self.device) < 0.5)).float()
        theta = torch.zeros(count, 2, 3, device=self.device)
        theta[:, 0, 0] = flip / size
        theta[:, 1, 1] = 1 / size
        theta[:, :, 2] = room / size[:, None]
        drawings = self.drawings[which]
        grid = F.affine_grid(theta, list(drawings.shape), align_corners=False)
        moved = F.grid_sample(drawings, grid, align_corners=False)
        return moved[:, :3] + (1 - moved[:, 3:]) * colours[:, :, None, None]

    def random(self, count: int) -> Tensor:
        """Random drawings, half of them on any colour, half on a named one: (count, 3, H, W)."""
        which = torch.randint(len(self.names), (count,), device=self.device)
        named = self.palette[torch.randint(len(self.palette), (count,), device=self.device)]
        colours = torch.rand(count, 3, device=self.device)
        colours[::2] = named[::2]
        images = self.compose(which, colours)
        return images.contiguous(memory_format=torch.channels_last)


def prompt(name: str, background: str) -> str:
    return f"{name} on a {background} background" if background else name


def without_a_word(name: str, chance: random.Random) -> str:
    """The name less one word, where it has two or more: prompts are seldom complete."""
    words = name.split()
    if len(words) > 1:
        del words[chance.randrange(len(words))]
    return " ".join(words)
