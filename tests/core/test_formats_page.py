"""docs/formats.md: its tables are the code's, its formulas what layers compute, its snippet reads a real file."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import small_flux
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from svdq_core import layers
from svdq_core.formats.comfy_quant import LAYOUTS, METADATA_KEY, LayerSpec, QuantizedCheckpoint
from svdq_core.layers import SVDQLinear
from svdq_core.numerics.nf4 import CODEBOOK
from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint
from svdq_core.quantizer.statistics import Calibration

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
SECTIONS = {text.split("\n", 1)[0]: text for text in PAGE.split("\n## ")[1:]}
TYPES = {
    "int8": torch.int8,
    "float32": torch.float32,
    "E4M3": torch.float8_e4m3fn,
    "16-bit": torch.bfloat16,
}
N, K, R = 320, 192, 24  # no two axes of one length


def rows(section):
    """Cells of a section's table, its head left out, by the first cell."""
    lines = [line for line in SECTIONS[section].splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_table_has_the_tensors_of_its_format(name):
    layer = LayerSpec("layer", name, N, K, R, bias=True, dtype=TYPES["16-bit"], channel_scale=name == "svdquant_nvfp4")
    written = {}
    for tensor, (shape, dtype, _) in rows(name).items():
        axes = [axis for axis in shape.strip("()").split(",") if axis]
        written[tensor] = tuple(eval(axis, {}, {"N": N, "K": K, "r": R}) for axis in axes), TYPES[dtype]
    assert written == {tensor: (spec.shape, spec.dtype) for tensor, spec in layer.tensors.items()}


def test_every_format_has_a_section_and_a_row():
    listed = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\)", PAGE, re.MULTILINE)
    assert {name for name, _ in listed} == LAYOUTS.keys()
    assert all(name == anchor and name in SECTIONS for name, anchor in listed)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A calibrated file of the small FLUX."""
    folder = tmp_path_factory.mktemp("page")
    save_file(small_flux.state_dict(), folder / "full.safetensors")
    calibration = Calibration(rows=64)
    for layer in small_flux.body_layers():
        calibration.observe(layer, small_flux.inputs(layer))
    path = folder / "quantized.safetensors"
    quantize_checkpoint(FileSource(folder / "full.safetensors"), path, Settings(), calibration)
    return path


def test_the_metadata_is_what_the_table_says(quantized):
    with safe_open(quantized, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {METADATA_KEY}
    assert json.loads(metadata[METADATA_KEY]).keys() == rows("Metadata").keys() - {"kept"}, "no layer was kept"


@pytest.mark.parametrize("name", small_flux.body_layers())
def test_the_snippet_reads_what_the_layer_computes_with(quantized, name):
    names = {}
    exec(PAGE.split("```python\n")[1].split("```")[0], names)
    checkpoint = QuantizedCheckpoint(quantized)
    layer = SVDQLinear(checkpoint.layers[name], checkpoint.read_layer(name))
    torch.testing.assert_close(names["weight_of"](quantized, name), layer.dequantized_weight())


HADAMARD = torch.tensor([[(-1) ** (i & j).bit_count() for j in range(64)] for i in range(64)], dtype=torch.float64) / 8
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def nibbles(packed):
    """(N, K) in [0, 15]: the even column is the low nibble."""
    return torch.stack((packed & 15, packed >> 4 & 15), dim=-1).flatten(1)


def by_group(scale, size):
    """(G, N) -> (N, K)."""
    return scale.t().repeat_interleave(size, dim=1)


def rounded(x, size, codes):
    """Each group of a row as its nearest codes, scaled so that its largest magnitude is the largest code."""
    groups = x.unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True) / codes.max()
    if codes is E2M1:
        scale = scale.to(torch.float8_e4m3fn).double()
    steps = torch.where(scale > 0, groups / scale, 0)
    nearest = codes[(steps.abs().unsqueeze(-1) - codes).abs().argmin(-1)]
    return (nearest * steps.sign() * scale).flatten(-2)


def residual(name, t):
    """R (or W) of the page, (N, K) float64, from the tensors of the file."""
    scale = t["weight_scale"].double()
    if name == "svdquant_w8a8":
        return t["weight"].double() * scale[:, None]
    codes = nibbles(t["weight"])
    if name == "svdquant_w4a4":
        return torch.where(codes < 8, codes, codes - 16) * by_group(scale, 64)
    if name == "svdquant_nvfp4":
        value = torch.cat((E2M1, -E2M1))[codes.int()]
        return value * by_group(scale, 16) * t["weight_tensor_scale"].double()
    if name == "awq_w4a16":
        return (codes - 8) * by_group(scale, 64) + by_group(t["weight_zero"].double(), 64)
    return torch.tensor(CODEBOOK, dtype=torch.float64)[codes.int()] * by_group(scale, 64)


def output(name, t, x, act_unsigned, rotated=False):
    """y of the page, float64."""
    weight, bias = residual(name, t), t["bias"].double()
    if "smooth_factor" not in t:
        return x @ weight.t() + bias
    s = t["smooth_factor"].double()
    if rotated:
        act = rounded(((x / s).unflatten(-1, (-1, 64)) @ HADAMARD).flatten(-2), 64, torch.arange(8).double())
    elif act_unsigned:
        act = rounded(((x + 0.171875) / s).clamp(min=0), 64, torch.arange(16).double())
    elif name == "svdquant_w8a8":
        act = rounded(x / s, x.shape[1], torch.arange(128).double())
    else:
        act = rounded(x / s, 64, torch.arange(8).double()) if name == "svdquant_w4a4" else rounded(x / s, 16, E2M1)
    return act @ weight.t() + x @ t["proj_down"].double() @ t["proj_up"].double().t() + bias


@pytest.mark.parametrize(
    ("precision", "rotated"), [("int4", False), ("int4", True), ("nvfp4", False), ("int8", False), ("nf4", False)]
)
def test_each_formula_is_what_a_layer_computes(tmp_path, precision, rotated):
    save_file(small_flux.state_dict(), tmp_path / "full.safetensors")
    settings = Settings(precision, "fast")
    quantize_checkpoint(FileSource(tmp_path / "full.safetensors"), tmp_path / "quantized.safetensors", settings)
    checkpoint = QuantizedCheckpoint(tmp_path / "quantized.safetensors")
    for name, spec in checkpoint.layers.items():
        tensors = checkpoint.read_layer(name)
        if "smooth_factor" in tensors:  # the recipe left it at one
            random = torch.rand(spec.in_features, generator=torch.Generator().manual_seed(2))
            tensors["smooth_factor"] = (random + 0.5).to(spec.dtype)
        if spec.format == "svdquant_w4a4" and not spec.act_unsigned:
            assert spec.rotated
            spec = dataclasses.replace(spec, rotated=rotated)
        x = small_flux.inputs(name, rows=32)
        computed = SVDQLinear(spec, tensors)(x).double()
        written = output(spec.format, tensors, x.double(), spec.act_unsigned, spec.rotated)
        assert torch.linalg.norm(computed - written) < 2e-3 * torch.linalg.norm(written), name


@pytest.mark.parametrize("precision", ["int4", "nvfp4"])
def test_the_8_bit_formula_is_what_a_layer_computes(tmp_path, precision, monkeypatch):
    monkeypatch.setattr(layers, "prefers_int8", lambda *_: True)  # as H100 and H200 do
    save_file(small_flux.state_dict(), tmp_path / "full.safetensors")
    quantize_checkpoint(
        FileSource(tmp_path / "full.safetensors"), tmp_path / "4bit.safetensors", Settings(precision, "fast")
    )
    checkpoint = QuantizedCheckpoint(tmp_path / "4bit.safetensors")
    for name in small_flux.body_layers():
        spec, tensors = checkpoint.layers[name], checkpoint.read_layer(name)
        random = torch.rand(spec.in_features, generator=torch.Generator().manual_seed(2))
        tensors["smooth_factor"] = (random + 0.5).to(spec.dtype)
        x = small_flux.inputs(name, rows=32).to(spec.dtype)
        computed = SVDQLinear(spec, tensors)(x).double()
        written = output_in_8_bits(spec.format, tensors, x.double(), spec.act_unsigned, spec.rotated)
        assert torch.linalg.norm(computed - written) < 3e-3 * torch.linalg.norm(written), name


def output_in_8_bits(name, t, x, act_unsigned, rotated):
    """y of the section on H100 and H200, float64."""

    def h(values):
        return (values.unflatten(-1, (-1, 64)) @ HADAMARD).flatten(-2)

    def in_16_bits(values):
        return values.to(t["smooth_factor"].dtype).double()

    s, codes = t["smooth_factor"].double(), torch.arange(128).double()
    quantized = residual(name, t)
    quantized = (h(quantized) if rotated else quantized) / s
    bias = t["bias"].double() + (0.171875 * quantized.sum(1) if act_unsigned else 0)
    weight = quantized + t["proj_up"].double() @ t["proj_down"].double().t()
    inverse = in_16_bits(1 / s)
    act, weight = in_16_bits(h(in_16_bits(x * inverse))), h(weight / inverse)
    return rounded(act, x.shape[1], codes) @ rounded(weight, x.shape[1], codes).t() + bias


def test_the_bias_undoes_the_shift(quantized):
    name = "double_blocks.0.img_mlp.2"
    tensors = QuantizedCheckpoint(quantized).read_layer(name)
    undone = 0.171875 * (residual("svdquant_w4a4", tensors) / tensors["smooth_factor"].double()).sum(1)
    torch.testing.assert_close(
        tensors["bias"].double() + undone, small_flux.state_dict()[f"{name}.bias"].double(), atol=2e-3, rtol=0
    )
