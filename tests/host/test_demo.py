"""The demo's graphs on the demo model: images come out, recognisable and close to 16 bits."""

import statistics

import numpy
import pytest

from demo.compare import psnr, sheet
from demo.run import QUANTIZED, draw_graph, measure, quantize_graph
from demo.settings import CALIBRATION_PROMPTS, PROMPTS

CHOSEN = ("strawberry", "pineapple on a blue background", "frog", "red heart")


@pytest.fixture(scope="module")
def drawn(comfy):
    """The quantized file, and images of CHOSEN in 16 and 4 bits."""
    graph, quantizer = quantize_graph()
    progress = comfy.run(graph).progress
    graph, saved = draw_graph(list(CHOSEN))
    result = comfy.run(graph)
    images = [[result.images(node)[0].convert("RGB") for node in nodes] for nodes in saved]
    file = comfy.base / "models" / "diffusion_models" / f"{QUANTIZED}.safetensors"
    return file, images, [step for step in progress if step.node == str(quantizer)]


def test_calibration_prompts_are_not_the_judged_ones():
    assert not set(CALIBRATION_PROMPTS) & set(PROMPTS) and set(CHOSEN) <= set(PROMPTS)


def test_the_4_bit_images_are_close_to_the_16_bit_ones(drawn):
    file, (full, quantized), _ = drawn
    report = measure(file, list(CHOSEN), full, quantized)
    assert report["psnr_db"] > 19 and report["ssim"] > 0.8
    assert report["layers_quantized"] == 28
    assert report["file_bytes_4bit"] < 0.6 * report["file_bytes_16bit"]
    # Close because it is the same picture, not because there is nothing to see.
    strangers = [psnr(image, other) for image, other in zip(quantized, full[1:] + full[:1], strict=True)]
    assert report["psnr_db"] > statistics.mean(strangers) + 6


def test_the_images_show_what_the_prompt_says(drawn):
    """Colours are the least a strawberry, a blue background, a frog and a heart must have right."""
    _, images, _ = drawn
    for strawberry, pineapple, frog, heart in images:
        for red in (strawberry, heart):
            r, g, b = numpy.asarray(red)[40:88, 40:88].reshape(-1, 3).mean(axis=0)
            assert r > 180 and r > g + 60 and r > b + 60
        r, g, b = numpy.asarray(frog)[60:110, 40:88].reshape(-1, 3).mean(axis=0)
        assert g > b + 40
        corner = numpy.asarray(pineapple)[:8, :8].reshape(-1, 3).mean(axis=0)
        assert abs(corner - (150, 200, 242)).max() < 25


def test_progress_goes_through_calibration_and_layers(drawn):
    _, _, steps = drawn
    values = [step.value for step in steps]
    assert values == sorted(values) and values[-1] == steps[-1].max
    assert {step.max for step in steps} == {steps[0].max}, "the bar's end must not move"


def test_the_sheet_shows_all_of_it(drawn):
    _, (full, quantized), _ = drawn
    picture = sheet(list(CHOSEN), full, quantized)
    assert picture.height > 4 * 128 and picture.width > 3 * 128
