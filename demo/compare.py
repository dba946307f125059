"""Two sets of images of the same prompts: how close they are, and a sheet that shows them."""

from collections.abc import Sequence

import numpy
from PIL import Image, ImageDraw, ImageFont
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

_CELL, _LABEL, _HEADER, _GAP = 128, 190, 24, 6
_GAIN = 4  # how much the difference is amplified in the sheet


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images."""
    with numpy.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(numpy.asarray(reference), numpy.asarray(image)))


def ssim(image: Image.Image, reference: Image.Image) -> float:
    """Structural similarity, 1 for equal images."""
    return float(structural_similarity(numpy.asarray(reference), numpy.asarray(image), channel_axis=-1))


def sheet(prompts: Sequence[str], references: Sequence[Image.Image], images: Sequence[Image.Image]) -> Image.Image:
    """One row per prompt: the prompt, 16-bit, 4-bit, and the difference, amplified."""
    row = _CELL + _GAP
    width = _LABEL + 3 * row
    canvas = Image.new("RGB", (width, _HEADER + row * len(prompts)), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    for column, title in enumerate(("16-bit", "4-bit", f"difference x{_GAIN}")):
        draw.text((_LABEL + column * row, 4), title, "#222222", font)
    for index, (prompt, reference, image) in enumerate(zip(prompts, references, images, strict=True)):
        y = _HEADER + index * row
        text = f"{_wrapped(draw, prompt, font)}\n{psnr(image, reference):.1f} dB"
        draw.multiline_text((8, y + 40), text, "#222222", font)
        for column, cell in enumerate((reference, image, _difference(image, reference))):
            canvas.paste(cell.resize((_CELL, _CELL)), (_LABEL + column * row, y))
    return canvas


def _difference(image: Image.Image, reference: Image.Image) -> Image.Image:
    pixels = numpy.asarray(image).astype(int) - numpy.asarray(reference).astype(int)
    return Image.fromarray((abs(pixels) * _GAIN).clip(0, 255).astype(numpy.uint8))


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > _LABEL - 16:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
