"""The file convention: what is accepted, and what each broken file is told."""

import dataclasses
import json

import pytest
import small_flux
import torch
from safetensors.torch import load_file, save_file

from svdq_core.errors import CheckpointError
from svdq_core.formats.comfy_quant import QuantizedCheckpoint
from svdq_core.layers import SVDQLinear
from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint

LAYER = "single_blocks.0.linear1"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    save_file(small_flux.state_dict(), folder / "full.safetensors")
    path = folder / "q.safetensors"
    quantize_checkpoint(FileSource(folder / "full.safetensors"), path, Settings(recipe="fast"))
    return path


def changed(quantized, tmp_path, change):
    tensors = load_file(quantized)
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    return tmp_path / "changed.safetensors"


def config(**entries):
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def test_tensors_are_those_of_the_convention(quantized):
    tensors = load_file(quantized)
    n, k = small_flux.layer_shapes()[LAYER]
    found = {
        key.removeprefix(f"{LAYER}."): (tuple(t.shape), t.dtype) for key, t in tensors.items() if key.startswith(LAYER)
    }
    found.pop("comfy_quant")
    half = torch.bfloat16
    assert found == {
        "weight": ((n, k // 2), torch.int8),
        "weight_scale": ((k // 64, n), half),
        "smooth_factor": ((k,), half),
        "proj_down": ((k, 32), half),
        "proj_up": ((n, 32), half),
        "bias": ((n,), half),
    }
    assert json.loads(bytes(tensors[f"{LAYER}.comfy_quant"].tolist())) == {"format": "svdquant_w4a4_rotated"}
    unsigned = tensors["double_blocks.0.img_mlp.2.comfy_quant"]
    assert json.loads(bytes(unsigned.tolist()))["act_unsigned"] is True


def test_modulations_have_the_published_weight_only_format(quantized):
    tensors, name = load_file(quantized), "double_blocks.0.img_mod.lin"
    n, k = small_flux.layer_shapes()[name]
    assert json.loads(bytes(tensors[f"{name}.comfy_quant"].tolist())) == {"format": "awq_w4a16", "group_size": 64}
    found = {key.removeprefix(f"{name}."): tuple(t.shape) for key, t in tensors.items() if key.startswith(name)}
    found.pop("comfy_quant")
    shapes = {"weight": (n, k // 2), "weight_scale": (k // 64, n), "weight_zero": (k // 64, n), "bias": (n,)}
    assert found == shapes


def test_embedders_are_copied(quantized):
    full, tensors = small_flux.state_dict(), load_file(quantized)
    assert torch.equal(tensors["img_in.weight"], full["img_in.weight"])


def test_the_tile_packed_layout_reads_the_same(quantized, tmp_path):
    def pack(tensors):
        n, k = small_flux.layer_shapes()[LAYER]
        for name, value in [(key, tensors[f"{LAYER}.{key}"]) for key in ("weight", "weight_scale", "proj_up")]:
            if name == "weight":
                # rows in tiles of 128 = 32 quads of 4; K in groups of 64 = 32 bytes
                value = value.reshape(n // 128, 32, 4, k // 64, 32).permute(0, 3, 1, 2, 4)
                value = value.reshape(n // 128, k // 64, 32, 128)
            elif name == "weight_scale":
                value = value.reshape(k // 64, n // 128, 128).permute(1, 0, 2)
            else:
                value = value.reshape(n // 128, 128, -1).permute(0, 2, 1)
            tensors[f"{LAYER}.{name}"] = value.contiguous()
        tensors[f"{LAYER}.comfy_quant"] = config(format="svdquant_w4a4", layout="kitchen_tile_packed_w4a4")

    natural = QuantizedCheckpoint(quantized).read_layer(LAYER)
    tiled = QuantizedCheckpoint(changed(quantized, tmp_path, pack)).read_layer(LAYER)
    for name, tensor in natural.items():
        assert torch.equal(tiled[name], tensor), name


def test_a_layer_computes_what_its_file_says(quantized):
    checkpoint = QuantizedCheckpoint(quantized)
    full = small_flux.state_dict()
    for name in checkpoint.layers:
        layer = SVDQLinear(checkpoint.layers[name], checkpoint.read_layer(name))
        x = small_flux.inputs(name)
        exact = torch.nn.functional.linear(x, full[f"{name}.weight"].float(), full[f"{name}.bias"].float())
        error = torch.linalg.norm(layer(x) - exact) / torch.linalg.norm(exact)
        assert error < 0.25, name


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), "lacks its tensor 'weight_scale'"),
        (lambda t: t.update({f"{LAYER}.comfy_quant": config(format="w3a3")}), "'w3a3'"),
        (lambda t: t.update({f"{LAYER}.comfy_quant": config(a=1)}), "cannot be read"),
        (
            lambda t: t.update({f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}),
            "cannot be read",
        ),
        (lambda t: t.update({f"{LAYER}.proj_up": torch.zeros(3, 3)}), "proj_up is"),
        (lambda t: t.update({f"{LAYER}.proj_down": torch.zeros(3)}), "not those of"),
        (lambda t: t.update({f"{LAYER}.weight": torch.zeros(8, 16).char()}), "K = 32"),
        (
            lambda t: t.update({f"{LAYER}.smooth_factor": torch.zeros(128, dtype=torch.int32)}),
            "smooth_factor is",
        ),
    ],
)
def test_a_broken_layer_is_named_with_its_file(quantized, tmp_path, change, why):
    path = changed(quantized, tmp_path, change)
    with pytest.raises(CheckpointError, match=why) as caught:
        QuantizedCheckpoint(path)
    assert LAYER in str(caught.value) and str(path) in str(caught.value)


def test_a_rotated_layer_has_a_format_of_its_own(quantized, tmp_path):
    """Who does not know of rotation must not read it as a plain one."""
    rotated = QuantizedCheckpoint(quantized).layers[LAYER]
    assert rotated.rotated
    plain = dataclasses.replace(rotated, rotated=False)
    assert json.loads(bytes(plain.config.tolist())) == {"format": "svdquant_w4a4"}
    path = changed(quantized, tmp_path, lambda t: t.update({f"{LAYER}.comfy_quant": plain.config}))
    layers = QuantizedCheckpoint(path).layers
    assert layers.pop(LAYER) == plain
    signed = [layer for layer in layers.values() if layer.format == "svdquant_w4a4" and not layer.act_unsigned]
    assert signed and all(layer.rotated for layer in signed)


def test_a_rotated_layer_is_signed(quantized, tmp_path):
    rotated = dataclasses.replace(QuantizedCheckpoint(quantized).layers[LAYER], rotated=True, act_unsigned=True)
    path = changed(quantized, tmp_path, lambda t: t.update({f"{LAYER}.comfy_quant": rotated.config}))
    with pytest.raises(CheckpointError, match=f"{LAYER}.* do not go together"):
        QuantizedCheckpoint(path)


def test_a_16_bit_file_is_told_where_to_go(tmp_path):
    save_file(small_flux.state_dict(), tmp_path / "full.safetensors")
    with pytest.raises(CheckpointError, match="Load Diffusion Model"):
        QuantizedCheckpoint(tmp_path / "full.safetensors")
