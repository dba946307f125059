"""Files of every precision in the host: loaded without a setting, adapted, moved, inspected."""

import pytest
import small_flux
import torch
from in_process import relative
from safetensors.torch import save_file
from test_nodes import latent_of, models, quantize, sampled, server  # noqa: F401 (fixtures)

from svdq_core.quantizer.pipeline import MODULATIONS, PRECISIONS, FileSource, Settings, quantize_checkpoint
from tools.comfy_host import Graph

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=PRECISIONS)
def file(request, flux_files, tmp_path_factory):
    """(precision, file) of the small FLUX."""
    path = tmp_path_factory.mktemp(request.param) / "q.safetensors"
    quantize_checkpoint(FileSource(flux_files.full), path, Settings(request.param, "fast"))
    return request.param, path


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of a layer of the body and of a modulation."""
    random, tensors = torch.Generator().manual_seed(3), {}
    for name in ("single_blocks.0.linear1", "double_blocks.0.img_mod.lin"):
        n, k = small_flux.layer_shapes()[name]
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_up.weight"] = torch.randn((n, 4), generator=random) * 0.2
        tensors[f"{key}.lora_down.weight"] = torch.randn((4, k), generator=random) * 0.2
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_file(tensors, path)
    return path


def test_a_file_draws_nearly_the_16_bit_image_with_and_without_a_lora(host, flux_files, file, lora):
    _precision, path = file
    quantized, full = host.load(path), host.load_16bit(flux_files.full)
    plain, plain_16 = host.sample(quantized), host.sample(full)
    error = relative(plain, plain_16)
    assert 0 < error < 0.2
    image, image_16 = (host.sample(host.apply_lora(model, lora, 1.0)[0]) for model in (quantized, full))
    assert relative(image, plain) > 0.05
    assert relative(image, image_16) < 1.5 * error
    assert torch.equal(host.sample(quantized), plain), "the LoRA must leave no trace"


def test_partial_loading_gives_the_same_image(host, file, lora):
    model, _ = host.apply_lora(host.load(file[1]), lora, 1.0)
    wanted = host.sample(model)
    host.unload_all()
    size = model.model_size()
    model.patch_model(CPU, lowvram_model_memory=int(0.7 * size))
    assert 0 < model.loaded_size() < size and model.model.model_lowvram
    first = host.step(model)
    model.partially_load(CPU, extra_memory=10 * size)
    assert not model.model.model_lowvram and torch.equal(host.step(model), first)
    model.unpatch_model(CPU)
    assert torch.equal(host.sample(model), wanted)


def test_the_compile_node_gives_the_same_image(host, file):
    model = host.load(file[1])
    compiled = host.compiled(model, backend="aot_eager")
    assert relative(host.sample(compiled), host.sample(model)) < 1e-5


def test_a_half_precision_host_keeps_each_tensor_s_own_type(host, file, monkeypatch):
    """Only what the file keeps in the model's type is cast with the model; scales of E4M3 and float32 are not."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda *_, **__: torch.float16)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_, **__: torch.float16)
    model = host.load(file[1])
    for _, layer in model.quantized_layers():
        for name, tensor in layer.named_parameters():
            stored = layer.spec.tensors[name].dtype
            assert tensor.dtype == stored and stored != torch.bfloat16, f"{layer.spec.name}.{name}"


@pytest.mark.parametrize("precision", ["nvfp4", "int8", "nf4"])
def test_the_node_makes_it_and_inspect_shows_it(server, models, precision):  # noqa: F811
    graph = Graph()
    choice = {"nvfp4": "16bit", "int8": "int8", "nf4": "awq_w4a16"}[precision]
    prompts = () if precision == "nf4" else ("a", "b")
    quantizer = quantize(graph, f"made/{precision}", prompts, precision=precision, modulations=choice)
    inspect = graph.add("SVDQuantInspect", model_name="small.safetensors", model=quantizer[0])
    made = sampled(graph, quantizer[0], precision)
    full = graph.add("UNETLoader", unet_name="small.safetensors", weight_dtype="default")
    exact = sampled(graph, full[0], "exact")
    result = server.run(graph)
    text = result.outputs[str(inspect)]["text"][0]
    formats = {line.split()[0]: line.split()[4] for line in text.splitlines() if line.split()[:1] and " x " in line}
    wanted = dict.fromkeys(small_flux.body_layers(), PRECISIONS[precision])
    if MODULATIONS[choice]:
        wanted |= dict.fromkeys(small_flux.modulations(), MODULATIONS[choice])
    formats.pop("layer", None)
    assert formats == wanted
    assert relative(latent_of(server, result, made), latent_of(server, result, exact)) < 0.2
