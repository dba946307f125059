"""How close two images are: PSNR, SSIM and, where it is installed with its weights, LPIPS."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import SVDQuantError

_SSIM_WINDOW = 11


@dataclass(frozen=True)
class Comparison:
    """Means over a batch of image pairs.

    Attributes:
        psnr: in dB; infinite for equal images.
        ssim: at most 1, for equal images; NaN where it could not be computed.
        lpips: 0 for equal images; NaN where it could not be computed.
        difference: (batch, height, width, 3), the absolute difference, amplified, in [0, 1].
        notes: why a number is missing, one sentence each.
    """

    psnr: float
    ssim: float
    lpips: float
    difference: torch.Tensor
    notes: tuple[str, ...]

    def text(self) -> str:
        """For a person to read."""
        numbers = f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.4f}, LPIPS {self.lpips:.4f}"
        return "\n".join((numbers.replace("nan", "-"), *self.notes))


def compare(image: torch.Tensor, reference: torch.Tensor, gain: float) -> Comparison:
    """Compare images with their references.

    Args:
        image, reference: (batch, height, width, channels), in [0, 1]; only red, green and blue are looked
            at. A batch of one is compared with each image of the other.
        gain: factor on the difference image.

    Raises:
        SVDQuantError: sizes or numbers of images that do not fit each other.
    """
    image, reference = (batch[..., :3].float().cpu().clamp(0, 1) for batch in (image, reference))
    if image.shape[1:] != reference.shape[1:]:
        raise SVDQuantError(
            f"the images are {_size(image)} and {_size(reference)} pixels. Compare images of one size: "
            "draw both from the same latent, or scale one."
        )
    if len(image) != len(reference) and 1 not in (len(image), len(reference)):
        raise SVDQuantError(f"{len(image)} images cannot be compared with {len(reference)}")
    image, reference = torch.broadcast_tensors(image, reference)
    difference = (image - reference).abs()
    notes: list[str] = []
    planes = (image.movedim(-1, 1), reference.movedim(-1, 1))
    return Comparison(
        psnr=_psnr(image, reference),
        ssim=_ssim(*planes, notes),
        lpips=_lpips(*planes, notes),
        difference=(difference * gain).clamp(0, 1),
        notes=tuple(notes),
    )


def _psnr(image: torch.Tensor, reference: torch.Tensor) -> float:
    errors = (image - reference).square().flatten(1).mean(1).tolist()
    return sum(-10 * math.log10(error) if error else math.inf for error in errors) / len(errors)


def _ssim(image: torch.Tensor, reference: torch.Tensor, notes: list[str]) -> float:
    """Wang et al. 2004: a Gaussian window of 11 pixels, sigma 1.5."""
    if min(image.shape[-2:]) < _SSIM_WINDOW:
        notes.append(f"SSIM needs images of {_SSIM_WINDOW} pixels or more.")
        return math.nan
    try:
        from kornia.metrics import ssim  # the host brings it, but counts it as not essential
    except ImportError:
        notes.append("SSIM needs the package kornia, which ComfyUI's requirements name.")
        return math.nan
    return float(ssim(image, reference, _SSIM_WINDOW, padding="valid").mean())


def _lpips(image: torch.Tensor, reference: torch.Tensor, notes: list[str]) -> float:
    """Zhang et al. 2018, on AlexNet; nothing is downloaded."""
    try:
        from lpips import LPIPS
        from torchvision.models import AlexNet_Weights
    except ImportError:
        notes.append("LPIPS needs the package lpips (pip install lpips) and AlexNet's weights.")
        return math.nan
    backbone = Path(torch.hub.get_dir()) / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    if not backbone.is_file():
        notes.append(f"LPIPS needs AlexNet's weights: torchvision keeps them as {backbone}.")
        return math.nan
    with torch.inference_mode():
        return float(LPIPS(net="alex", verbose=False)(image, reference, normalize=True).mean())


def _size(images: torch.Tensor) -> str:
    return f"{images.shape[2]} x {images.shape[1]}"
