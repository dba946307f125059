"""Every key dialect of SDXL LoRAs, on a small UNet with SDXL's own layout."""

import pytest
import torch
from in_process import relative
from safetensors.torch import save_file
from test_model import make_lora

from svdq_core.errors import CheckpointError
from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint
from tools.comfy_in_process import InProcessHost

CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "image_size": 32,
    "use_checkpoint": False,
    "legacy": False,
}
# A self-attention's query, a cross-attention's key and a feed-forward: (N, K) by diffusers' names.
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0."
SHAPES = {BLOCK + "attn1.to_q": (128, 128), BLOCK + "attn2.to_k": (128, 2048), BLOCK + "ff.net.0.proj": (1024, 128)}


def underscored(prefix):
    return lambda name: prefix + name.replace(".", "_")


DIALECTS = {
    "kohya, Stability's names": (
        lambda name: "lora_unet_" + name.replace(BLOCK, "input_blocks.4.1.transformer_blocks.0.").replace(".", "_"),
        "kohya",
    ),
    "kohya and OneTrainer, diffusers' names": (underscored("lora_unet_"), "kohya"),
    "LyCORIS": (underscored("lycoris_"), "kohya"),
    "diffusers": (lambda name: "unet." + name.replace(".to_", ".processor.to_"), "processors"),
}
SUFFIXES = {
    "kohya": (".lora_up.weight", ".lora_down.weight"),
    "processors": ("_lora.up.weight", "_lora.down.weight"),
    "peft": (".lora_B.weight", ".lora_A.weight"),
}


def small_unet():
    """Weights of a UNet with SDXL's layout."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    random = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in UNetModel(**CONFIG, device="meta").state_dict().items()}
    weights = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            weights[name] = torch.randn(shape, generator=random) * shape[1:].numel() ** -0.5
        else:
            weights[name] = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    return {name: tensor.bfloat16() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def models(host, tmp_path_factory):
    """The 16-bit and the quantized UNet, for which the host is told that there is an SDXL of this size."""
    import comfy.supported_models

    sdxl = comfy.supported_models.SDXL
    sizes = {name: CONFIG[name] for name in ("model_channels", "transformer_depth")}
    small = type("SmallSDXL", (sdxl,), {"unet_config": sdxl.unet_config | sizes})
    folder = tmp_path_factory.mktemp("sdxl")
    save_file(small_unet(), folder / "full.safetensors")
    quantize_checkpoint(
        FileSource(folder / "full.safetensors"), folder / "quantized.safetensors", Settings(recipe="fast")
    )
    comfy.supported_models.models.insert(0, small)
    try:
        yield host.load_16bit(folder / "full.safetensors"), host.load(folder / "quantized.safetensors")
    finally:
        comfy.supported_models.models.remove(small)


def draw(host, model):
    random = torch.Generator().manual_seed(2)
    pooled = {"pooled_output": torch.randn((1, 1280), generator=random)}
    prompt = [[torch.randn((1, 77, 2048), generator=random), pooled]]
    return InProcessHost.sample(host, model, prompt, prompt, (1, 4, 16, 16), seed=1, steps=2)


def write_lora(path, style, rename, layers):
    """A LoRA of rank 4 under a dialect's names."""
    random = torch.Generator().manual_seed(3)
    up, down = SUFFIXES[style]
    tensors = {}
    for layer in layers:
        n, k = SHAPES[layer]
        # The product is as large as the weight.
        tensors[rename(layer) + up] = torch.randn((n, 4), generator=random) * 0.5
        tensors[rename(layer) + down] = torch.randn((4, k), generator=random) * k**-0.5
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_acts_as_on_the_16_bit_model(host, models, tmp_path, dialect):
    full, quantized = models
    rename, style = DIALECTS[dialect]
    # The host reads diffusers' own files for attention only, as diffusers itself trained no more.
    layers = [layer for layer in SHAPES if style == "kohya" or ".to_" in layer]
    lora = write_lora(tmp_path / "lora.safetensors", style, rename, layers)
    adapted, report = host.apply_lora(quantized, lora, 1.0)
    assert f"{len(layers)} of {len(layers)} layers matched" in report
    wanted = draw(host, host.apply_lora(full, lora, 1.0)[0])
    plain, plain_16, found = draw(host, quantized), draw(host, full), draw(host, adapted)
    assert relative(wanted, plain_16) > 0.01, "it does something"
    assert relative(found, wanted) < 1.5 * relative(plain, plain_16)


def test_names_the_host_does_not_read_are_reported(host, models, tmp_path):
    """Newer diffusers files: ComfyUI 0.3.75 knows the feed-forward's name, and not the attention's."""
    lora = write_lora(tmp_path / "lora.safetensors", "peft", lambda name: "unet." + name, SHAPES)
    _, report = host.apply_lora(models[1], lora, 1.0)
    assert "4 tensors not used, e.g. unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in report


def test_a_text_encoder_only_file_is_named(host, models, tmp_path):
    lora = make_lora(tmp_path / "te.safetensors", {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768)})
    with pytest.raises(CheckpointError, match="looks to be for a text encoder only"):
        host.apply_lora(models[1], lora, 1.0)
