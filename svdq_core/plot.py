"""A bar chart of the layers' errors and sizes, drawn with Pillow, which every host has."""

from PIL import Image, ImageDraw, ImageFont

from .summary import LayerSummary, Summary

_WIDTH, _ROW, _TOP = 960, 18, 70
_INK, _GREY, _BLUE, _ORANGE = "#222222", "#dddddd", "#4c78a8", "#f58518"


def plot_summary(summary: Summary) -> Image.Image:
    """One row per layer: its bytes beside those of 16 bits, and its error."""
    image = Image.new("RGB", (_WIDTH, _TOP + _ROW * len(summary.layers) + 12), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=12)
    names = max(draw.textlength(layer.name, font) for layer in summary.layers) + 20
    bar = (_WIDTH - names - 120) / 2
    largest_bytes = max(layer.nbytes_16bit for layer in summary.layers)
    largest_error = max((_error(layer) or 0.0 for layer in summary.layers), default=0.0)
    draw.text((10, 8), summary.title.replace("\\", "/").rsplit("/", 1)[-1], _INK, font)
    error_x = names + bar + 70
    draw.text((names, 44), "size (grey: 16-bit)", _INK, font)
    draw.text((error_x, 44), "relative error", _INK, font)
    for row, layer in enumerate(summary.layers):
        y = _TOP + row * _ROW
        draw.text((10, y), layer.name, _INK, font)
        full = bar * layer.nbytes_16bit / largest_bytes
        used = bar * layer.nbytes / largest_bytes
        draw.rectangle((names, y + 3, names + full, y + 13), _GREY)
        draw.rectangle((names, y + 3, names + used, y + 13), _BLUE)
        draw.text((names + full + 6, y), f"{layer.nbytes / 1e6:.2f} MB", _INK, font)
        error = _error(layer)
        if error is not None and largest_error > 0:
            length = (bar - 40) * error / largest_error
            draw.rectangle((error_x, y + 3, error_x + length, y + 13), _ORANGE)
            draw.text((error_x + length + 6, y), f"{error:.3f}", _INK, font)
    return image


def _error(layer: LayerSummary) -> float | None:
    return layer.errors.get("output_error", layer.errors.get("weight_error"))
