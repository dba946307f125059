"""The quantized MODEL behaves like any other in the host: loading, patches, hooks, memory, compile.

These run ComfyUI's own code in this process, on a small FLUX with random weights.
"""

import pytest
import small_flux
import torch
from in_process import relative
from safetensors.torch import load_file, save_file

from svdq_core.errors import CheckpointError

CPU = torch.device("cpu")
QKV = "double_blocks.0.img_attn.qkv"
LINEAR1 = "single_blocks.0.linear1"


def make_lora(path, shapes, style="kohya", rank=4, scale=0.2, seed=3, value=None):
    random = torch.Generator().manual_seed(seed)
    up, down = {
        "kohya": (".lora_up.weight", ".lora_down.weight"),
        "diffusers": (".lora_B.weight", ".lora_A.weight"),
    }[style]
    tensors = {}
    for name, (n, k) in shapes.items():
        tensors[name + up] = torch.randn((n, rank), generator=random) * scale
        tensors[name + down] = torch.randn((rank, k), generator=random) * scale
        if style == "kohya":
            tensors[name + ".alpha"] = torch.tensor(rank / 2)
    if value is not None:
        next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def kohya(tmp_path_factory, flux_files):
    """Two layers of the body and a modulation, under kohya's key names."""
    h = flux_files.hidden
    shapes = {
        "lora_unet_double_blocks_0_img_attn_qkv": (3 * h, h),
        "lora_unet_single_blocks_0_linear1": (7 * h, h),
        "lora_unet_single_blocks_0_modulation_lin": (3 * h, h),
    }
    return make_lora(tmp_path_factory.mktemp("lora") / "kohya.safetensors", shapes)


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory, flux_files):
    """Parts of fused layers, under diffusers' key names."""
    h = flux_files.hidden
    shapes = {
        "transformer.transformer_blocks.0.attn.to_k": (h, h),
        "transformer.single_transformer_blocks.0.attn.to_v": (h, h),
        "transformer.single_transformer_blocks.0.proj_out": (h, 5 * h),
    }
    return make_lora(tmp_path_factory.mktemp("lora") / "diffusers.safetensors", shapes, "diffusers")


def test_a_loaded_model_draws_nearly_the_16_bit_image(host, flux_files):
    quantized, full = host.load(flux_files.quantized), host.load_16bit(flux_files.full)
    assert type(quantized.model) is type(full.model)
    error = relative(host.sample(quantized), host.sample(full))
    assert 0 < error < 0.15


@pytest.mark.parametrize("exact", [False, True])
def test_layers_are_told_how_to_evaluate(host, flux_files, exact):
    from svdq_core.host.loader import load_quantized

    model = load_quantized(flux_files.quantized, exact)
    assert {layer.exact for _, layer in model.quantized_layers()} == {exact}


@pytest.mark.parametrize(("exact", "merged"), [(False, True), (True, True), (False, False)])
@pytest.mark.usefixtures("host")
def test_what_a_lora_will_want_is_compiled_where_there_is_a_branch(flux_files, monkeypatch, exact, merged):
    from svdq_core.host import loader

    compiled = []
    monkeypatch.setattr(loader, "prefers_int8", lambda *_: merged)
    monkeypatch.setattr(loader, "compile_for_adapters", lambda device, dtype, formats: compiled.append(formats))
    loader.load_quantized(flux_files.quantized, exact)
    assert ("svdquant_w4a4" in compiled[0]) == (exact or not merged) and "awq_w4a16" in compiled[0]


@pytest.mark.usefixtures("host")
def test_the_badge_counts_weights_in_8_bits(flux_files, monkeypatch):
    from svdq_core.host import badge
    from svdq_core.summary import summarize_file

    summary = summarize_file(flux_files.quantized)
    before = badge._on_this_machine(summary, 0)["needed_bytes"]
    monkeypatch.setattr(badge, "prefers_int8", lambda *_: True)
    shapes = [layer.shape for layer in summary.layers if layer.format.startswith("svdquant_w4a4")]
    assert badge._on_this_machine(summary, 0)["needed_bytes"] - before == sum(n * k for n, k in shapes) > 0


def test_only_the_layers_in_the_file_are_quantized(host, flux_files):
    model = host.load(flux_files.quantized)
    names = {key.removeprefix("diffusion_model.") for key, _ in model.quantized_layers()}
    assert names == {f"{layer}.weight" for layer in small_flux.quantized_layers()}


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_a_lora_acts_as_on_the_16_bit_model(host, flux_files, dialect, request):
    lora = request.getfixturevalue(dialect)
    quantized, full = host.load(flux_files.quantized), host.load_16bit(flux_files.full)
    plain, plain_16 = host.sample(quantized), host.sample(full)
    with_lora, report = host.apply_lora(quantized, lora, 1.0)
    full_with_lora, _ = host.apply_lora(full, lora, 1.0)
    image, image_16 = host.sample(with_lora), host.sample(full_with_lora)
    assert "3 layers matched" in report
    assert relative(image, plain) > 0.05
    assert relative(image, image_16) < 1.5 * relative(plain, plain_16)
    assert torch.equal(host.sample(quantized), plain), "the original MODEL must not change"


def test_a_lora_changes_a_weight_by_exactly_its_product(host, flux_files, kohya):
    model, _ = host.apply_lora(host.load(flux_files.quantized), kohya, 0.5)
    model.patch_model(CPU)
    layer = model.model.diffusion_model.get_submodule(LINEAR1)
    tensors = load_file(kohya)
    name = "lora_unet_single_blocks_0_linear1"
    wanted = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] * 0.5 * 0.5
    found = layer.adapted_weight() - layer.dequantized_weight()
    assert relative(found, wanted) < 5e-3  # the factors are kept in bf16
    model.unpatch_model(CPU)
    assert torch.equal(layer.adapted_weight(), layer.dequantized_weight())


def test_clones_with_different_loras_do_not_disturb_each_other(host, flux_files, kohya, diffusers):
    model = host.load(flux_files.quantized)
    one, _ = host.apply_lora(model, kohya, 1.0)
    other, _ = host.apply_lora(model, diffusers, 1.0)
    both, _ = host.apply_lora(one, diffusers, 1.0)
    models = (model, one, other, both)
    first = [host.sample(m) for m in models]
    second = [host.sample(m) for m in reversed(models)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[1], first[2]) and not torch.equal(first[1], first[3])


def test_strength_zero_costs_nothing(host, flux_files, kohya):
    model = host.load(flux_files.quantized)
    assert host.apply_lora(model, kohya, 0.0)[0] is model


def test_stored_bytes_are_the_same_after_any_use(host, flux_files, kohya):
    model = host.load(flux_files.quantized)
    before = {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}
    host.sample(host.apply_lora(model, kohya, 1.0)[0])
    model.unpatch_model(CPU)
    after = model.model.diffusion_model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("kind", ["diff", "bias diff", "scaled", "loha"], ids=lambda kind: kind.replace(" ", "-"))
def test_patches_of_other_kinds_act_as_on_the_16_bit_model(host, flux_files, kind):
    h = flux_files.hidden
    random = torch.Generator().manual_seed(1)
    weight = f"diffusion_model.{QKV}.weight"
    # an unsigned layer: its stored bias is not the model's own
    bias = "diffusion_model.double_blocks.0.img_mlp.2.bias"
    strength_model = 0.5 if kind == "scaled" else 1.0
    diff = torch.randn((3 * h, h), generator=random) * 0.1
    patches = {
        "diff": {weight: ("diff", (diff,))},
        "scaled": {weight: ("diff", (diff,)), bias: ("diff", (torch.ones(h),))},
        "bias diff": {bias: ("diff", (torch.ones(h),))},
        "loha": {weight: host.loha(3 * h, h, random)},
    }[kind]
    images = []
    for model in (host.load(flux_files.quantized), host.load_16bit(flux_files.full)):
        patched = model.clone()
        patched.add_patches(patches, 1.0, strength_model)
        images += [host.sample(model), host.sample(patched)]
    plain, patched, plain_16, patched_16 = images
    assert relative(patched, plain) > 0.02
    assert relative(patched, patched_16) < 1.5 * relative(plain, plain_16)


def test_merging_reads_the_quantized_weight(host, flux_files):
    """What ModelMergeSimple does: the 16-bit model takes over the quantized one's weights."""
    quantized, full = host.load(flux_files.quantized), host.load_16bit(flux_files.full)
    weights = quantized.get_key_patches("diffusion_model.")
    merged = full.clone()
    keys = [key for key in weights if key in full.model.state_dict()]
    merged.add_patches({key: weights[key] for key in keys}, 1.0, 0.0)
    merged.patch_model(CPU)
    found = merged.model.diffusion_model.get_submodule(QKV).weight
    layer = quantized.model.diffusion_model.get_submodule(QKV)
    assert torch.allclose(found, layer.dequantized_weight(), atol=1e-5)
    mlp = "double_blocks.0.img_mlp.2"
    bias = merged.model.diffusion_model.get_submodule(mlp).bias
    merged.unpatch_model(CPU)
    original = full.model.diffusion_model.get_submodule(mlp).bias
    assert relative(bias, original) < 0.05


def test_lora_hooks_act_like_the_lora(host, flux_files, kohya):
    model = host.load(flux_files.quantized)
    plain, with_lora = host.sample(model), host.sample(host.apply_lora(model, kohya, 1.0)[0])
    hooked = host.with_lora_hook(host.conditioning(), kohya, 1.0)
    assert relative(host.sample(model, hooked), with_lora) < 1e-3
    assert torch.equal(host.sample(model), plain)
    assert relative(host.sample(model, hooked), with_lora) < 1e-3, "a hook must work twice"
    half = host.with_lora_hook(host.conditioning(), kohya, 0.5)
    weaker = host.sample(host.apply_lora(model, kohya, 0.5)[0])
    assert relative(host.sample(model, half), weaker) < 1e-3


def test_hooks_come_on_top_of_a_lora(host, flux_files, kohya, diffusers):
    model = host.load(flux_files.quantized)
    one, _ = host.apply_lora(model, kohya, 1.0)
    both, _ = host.apply_lora(one, diffusers, 1.0)
    hooked = host.with_lora_hook(host.conditioning(), diffusers, 1.0)
    wanted = host.sample(both)
    # Ranks add up in another order, which may tip a code of an activation over.
    assert relative(host.sample(one, hooked), wanted) < 0.05 * relative(host.sample(one), wanted)


@pytest.mark.parametrize("with_lora", [False, True])
def test_partial_loading_gives_the_same_image(host, flux_files, kohya, with_lora):
    model = host.load(flux_files.quantized)
    if with_lora:
        model, _ = host.apply_lora(model, kohya, 1.0)
    wanted = host.sample(model)
    host.unload_all()
    size = model.model_size()
    model.patch_model(CPU, lowvram_model_memory=int(0.7 * size))
    assert 0 < model.loaded_size() < size and model.model.model_lowvram
    images = [host.step(model)]
    freed = model.partially_unload(CPU, model.loaded_size() // 2)
    assert freed > 0
    images.append(host.step(model))
    model.partially_load(CPU, extra_memory=10 * size)
    assert not model.model.model_lowvram
    images.append(host.step(model))
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    model.unpatch_model(CPU)
    assert torch.equal(host.sample(model), wanted)


def test_memory_is_accounted_for(host, flux_files):
    model, full = host.load(flux_files.quantized), host.load_16bit(flux_files.full)
    layers = [layer for _, layer in model.quantized_layers()]
    packed = sum(p.nbytes for layer in layers for p in layer.parameters())
    in_16_bits = sum(2 * layer.in_features * layer.out_features for layer in layers)
    assert packed < in_16_bits / 1.6  # rank 32 is a large part of such small layers
    # The full model is held in float32 on a CPU: 4 bytes where the file has 2.
    assert model.model_size() < full.model_size() - 2 * in_16_bits + packed
    host.sample(model)
    assert model.loaded_size() == model.model_size()
    host.unload_all()
    assert model.loaded_size() == 0


def test_weight_wrappers_see_the_16_bit_weight(host, flux_files):
    model = host.load(flux_files.quantized).clone()
    shapes = []

    def halve(weight):
        shapes.append(tuple(weight.shape))
        return weight * 0.5

    for key in (f"diffusion_model.{QKV}.weight", "diffusion_model.double_blocks.0.img_mlp.2.weight"):
        model.add_weight_wrapper(key, halve)
    image = host.sample(model)
    h = flux_files.hidden
    assert {(3 * h, h), (h, 4 * h)} == set(shapes)
    full = host.load_16bit(flux_files.full).clone()
    for key in (f"diffusion_model.{QKV}.weight", "diffusion_model.double_blocks.0.img_mlp.2.weight"):
        full.add_weight_wrapper(key, lambda weight: weight * 0.5)
    assert relative(image, host.sample(full)) < 0.15


def test_block_patches_and_control_reach_the_model(host, flux_files):
    """What ControlNet-like nodes use: block replacement, and residuals added after each block."""
    model = host.load(flux_files.quantized).clone()
    seen = []

    def replace(arguments, extra):
        seen.append(arguments["img"].shape)
        return extra["original_block"](arguments)

    plain = host.sample(model)
    model.set_model_patch_replace(replace, "dit", "double_block", 0)
    assert torch.equal(host.sample(model), plain) and len(seen) == host.steps
    added = torch.randn((1, 64, flux_files.hidden), generator=torch.Generator().manual_seed(2))
    residual = {"input": [added], "output": []}
    without, with_control = host.step(model), host.step(model, control=residual)
    assert relative(with_control, without) > 1e-3


def test_model_sampling_nodes_work(host, flux_files):
    model = host.load(flux_files.quantized)
    shifted = host.model_sampling_flux(model)
    assert not torch.equal(host.sample(shifted), host.sample(model))


def test_the_compile_node_gives_the_same_image(host, flux_files, kohya):
    """TorchCompileModel's wrapper, as one graph per block without a compiler for the CPU."""
    model = host.load(flux_files.quantized)
    compiled = host.compiled(model, backend="aot_eager")
    assert relative(host.sample(compiled), host.sample(model)) < 1e-5
    with_lora, _ = host.apply_lora(model, kohya, 1.0)
    compiled = host.compiled(with_lora, backend="aot_eager")
    assert relative(host.sample(compiled), host.sample(with_lora)) < 1e-5


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("img_in.bias"), "img_in.bias is missing"),
        (lambda t: t.pop("double_blocks.0.img_attn.norm.query_norm.scale"), "is missing"),
        (lambda t: [t.pop(k) for k in list(t) if k.startswith("img_in")], "does not know"),
        (
            lambda t: [t.pop(k) for k in list(t) if k.startswith(LINEAR1)],
            "not a model this pack can quantize",
        ),
    ],
)
def test_an_incomplete_file_is_refused(host, flux_files, tmp_path, change, why):
    tensors = load_file(flux_files.quantized)
    change(tensors)
    save_file(tensors, tmp_path / "incomplete.safetensors")
    with pytest.raises(CheckpointError, match=why):
        host.load(tmp_path / "incomplete.safetensors")


def test_a_16_bit_file_is_refused_with_advice(host, flux_files):
    with pytest.raises(CheckpointError, match="Load Diffusion Model"):
        host.load(flux_files.full)


def test_a_layer_of_another_shape_is_named(host, flux_files, tmp_path):
    tensors = load_file(flux_files.quantized)
    for name in list(tensors):  # a wider layer, fine in itself
        if name.startswith(f"{QKV}."):
            axis = 1 if name.endswith("weight_scale") else 0
            if tensors[name].dim() and not name.endswith(("smooth_factor", "proj_down", "quant")):
                tensors[name] = torch.cat([tensors[name]] * 2, dim=axis)
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=f"layer {QKV} is"):
        host.load(tmp_path / "wide.safetensors")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path, h: make_lora(path, {"other.layer": (h, h)}), "none of its 3 tensors fits"),
        (
            lambda path, h: make_lora(path, {"lora_unet_double_blocks_0_img_attn_qkv": (3 * h, h)}, value=float("nan")),
            "NaN",
        ),
        (lambda path, h: path.write_bytes(b"short"), "damaged"),
    ],
)
def test_bad_loras_are_refused(host, flux_files, tmp_path, make, why):
    path = tmp_path / "bad.safetensors"
    make(path, flux_files.hidden)
    model = host.load(flux_files.quantized)
    with pytest.raises(CheckpointError, match=why) as caught:
        host.apply_lora(model, path, 1.0)
    assert "bad.safetensors" in str(caught.value)


def test_a_lora_of_the_wrong_shape_leaves_the_layer_alone(host, flux_files, tmp_path, caplog):
    path = make_lora(tmp_path / "wrong.safetensors", {"lora_unet_double_blocks_0_img_attn_qkv": (64, 64)})
    model = host.load(flux_files.quantized)
    plain = host.sample(model)
    assert torch.equal(host.sample(host.stock_lora(model, path, 1.0)), plain)
    assert QKV in caplog.text


def test_a_model_s_weights_carry_their_published_names(host, flux_files):
    """Newer hosts rename some tensors as they load them; a file must load in every host."""
    source = host.source(host.load_16bit(flux_files.full))
    tensors = load_file(flux_files.full)
    assert set(source.specs) == set(tensors)
    assert all(torch.equal(source.get(name).to(tensors[name].dtype), tensors[name]) for name in tensors)


def test_a_model_s_patches_are_part_of_its_weights(host, flux_files, kohya):
    full = host.load_16bit(flux_files.full)
    patched, _ = host.apply_lora(full, kohya, 1.0)
    lora, name = load_file(kohya), "lora_unet_single_blocks_0_linear1"
    added = lora[f"{name}.lora_up.weight"] @ lora[f"{name}.lora_down.weight"] * 0.5
    weight = load_file(flux_files.full)[f"{LINEAR1}.weight"].float()
    for loaded in (False, True):
        if loaded:
            host.sample(patched)  # now the host has patched its own copy
        found = host.source(patched).get(f"{LINEAR1}.weight").float()
        assert relative(found - weight, added) < 1e-2
    host.unload_all()
