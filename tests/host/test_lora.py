"""LoRA of every kind and dialect on the quantized model, against the same on the 16-bit one."""

import pytest
import torch
from in_process import relative
from safetensors.torch import save_file
from test_model import make_lora

from svdq_core.errors import CheckpointError

UNET_QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def tensors_of(kind, h):
    """An adapter of a kind for one layer, 3h x h, under the names that the host reads."""
    random = torch.Generator().manual_seed(5)

    def draw(*shape, scale=0.3):
        return torch.randn(shape, generator=random) * scale

    n, k = 3 * h, h
    parts = {
        "lora": {"lora_up.weight": draw(n, 4), "lora_down.weight": draw(4, k)},
        "loha": {"hada_w1_a": draw(n, 3), "hada_w1_b": draw(3, k), "hada_w2_a": draw(n, 3), "hada_w2_b": draw(3, k)},
        "lokr": {"lokr_w1": draw(4, 4), "lokr_w2": draw(n // 4, k // 4)},
        "dora": {
            "lora_up.weight": draw(n, 4),
            "lora_down.weight": draw(4, k),
            "dora_scale": draw(n, 1, scale=0.1).abs() + 1,
        },
        "glora": {
            "a1.weight": draw(4, k, scale=0.1),
            "a2.weight": draw(k, 4, scale=0.1),
            "b1.weight": draw(4, k),
            "b2.weight": draw(n, 4),
        },
        "oft": {"oft_blocks": draw(n // 8, 8, 8)},
        "boft": {"oft_blocks": draw(2, n // 8, 8, 8)},
        "diff": {"diff": draw(n, k, scale=0.05)},
        "bias": {"diff_b": draw(n)},
    }[kind]
    return {f"{UNET_QKV}.{name}": tensor for name, tensor in parts.items()} | {
        f"{UNET_QKV}.alpha": torch.tensor(4.0 if kind not in ("oft", "boft") else 0.0)
    }


KINDS = ["lora", "loha", "lokr", "dora", "glora", "oft", "boft", "diff", "bias"]


@pytest.fixture(scope="module")
def models(host, flux_files):
    """The quantized and the 16-bit model, and what they draw."""
    quantized, full = host.load(flux_files.quantized), host.load_16bit(flux_files.full)
    return quantized, full, host.sample(quantized), host.sample(full)


@pytest.fixture
def file(tmp_path, flux_files):
    def write(kind, name="lora.safetensors"):
        save_file(tensors_of(kind, flux_files.hidden), tmp_path / name)
        return tmp_path / name

    return write


def test_stock_nodes_do_the_same(host, models, file):
    for kind in ("lora", "lokr"):
        path = file(kind)
        stock, ours = host.stock_lora(models[0], path, 0.7), host.apply_lora(models[0], path, 0.7)[0]
        assert torch.equal(host.sample(stock), host.sample(ours))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_acts_as_on_the_16_bit_model(host, models, file, kind):
    quantized, full, plain, plain_16 = models
    found = host.sample(host.apply_lora(quantized, file(kind), 1.0)[0])
    wanted = host.sample(host.apply_lora(full, file(kind), 1.0)[0])
    assert relative(found, plain) > 0.01, "it does something"
    assert relative(found, wanted) < 1.5 * relative(plain, plain_16)


def test_the_report_says_how_each_is_kept(host, models, file):
    from svdq_core.host.lora import LoraRow, apply_loras

    quantized = models[0]
    _, _, (loha,) = apply_loras(quantized, None, [LoraRow(file("loha"), 1.0)])
    assert (loha.matched, loha.total, loha.rank, loha.message) == (1, 1, 9, ""), "a LoHa of rank 3 has rank 9"
    assert loha.bytes > 0 and loha.percent > 0
    _, _, (diff,) = apply_loras(quantized, None, [LoraRow(file("diff"), 1.0)])
    assert diff.rank == 0 and "1 layers keep a dense 16-bit difference" in diff.message


def test_a_changed_strength_fits_nothing_anew(host, flux_files, file, monkeypatch):
    from svdq_core.host import patches
    from svdq_core.host.lora import LoraFiles, LoraRow, apply_loras

    calls = []
    fit = patches.fit
    monkeypatch.setattr(patches, "fit", lambda *arguments: calls.append(1) or fit(*arguments))
    model, files, loha, dora = host.load(flux_files.quantized), LoraFiles(), file("loha", "a"), file("dora", "b")
    images = []
    for strength in (1.0, 0.5, 1.0):
        adapted, _, _ = apply_loras(model, None, [LoraRow(loha, strength)], files=files)
        images.append(host.sample(adapted))
    assert len(calls) == 1
    assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])
    for strength in (1.0, 0.5):
        adapted, _, _ = apply_loras(model, None, [LoraRow(dora, strength)], files=files)
    assert len(calls) == 3, "a DoRA is not proportional to its strength"


def test_the_report_measures_what_the_layers_get(host, models, file):
    from svdq_core.host.lora import LoraRow, apply_loras
    from svdq_core.host.patches import AdapterSettings

    for kind in KINDS:
        for recompress in (0.0, 0.01):
            settings = AdapterSettings(recompress=recompress)
            adapted, _, (report,) = apply_loras(models[0], None, [LoraRow(file(kind), 1.0)], settings)
            key = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
            layer = dict(adapted.quantized_layers())[key]
            built = adapted.adapter(layer, key, adapted.patches.get(key))
            rank, dense = (0, False) if built is None else (built.down.shape[1], built.delta is not None)
            assert report.rank == rank and ("dense" in report.message) == dense, kind


def test_a_file_is_made_sense_of_once_until_it_changes(models, file, monkeypatch):
    import comfy.lora

    from svdq_core.host.lora import LoraFiles, LoraRow, apply_loras

    calls = []
    load = comfy.lora.load_lora
    monkeypatch.setattr(comfy.lora, "load_lora", lambda *arguments: calls.append(1) or load(*arguments))
    files, path = LoraFiles(), file("lora")
    for strength in (1.0, 0.5):
        apply_loras(models[0], None, [LoraRow(path, strength)], files=files)
    assert len(calls) == 1
    adapted, _, _ = apply_loras(models[0], None, [LoraRow(file("loha"), 1.0)], files=files)
    ((_, patch, *_),) = adapted.patches["diffusion_model.double_blocks.0.img_attn.qkv.weight"]
    assert patch.name == "loha" and len(calls) == 2


def test_several_at_once_are_one_after_another(host, models, file):
    from svdq_core.host.lora import LoraRow, apply_loras

    quantized = models[0]
    rows = [LoraRow(file("lora", "a.safetensors"), 1.0), LoraRow(file("loha", "b.safetensors"), -0.5)]
    together, _, reports = apply_loras(quantized, None, rows)
    one, _ = host.apply_lora(quantized, rows[0].path, 1.0)
    both, _ = host.apply_lora(one, rows[1].path, -0.5)
    assert [report.matched for report in reports] == [1, 1]
    assert torch.equal(host.sample(together), host.sample(both))


def test_recompression_keeps_the_image(host, models, file):
    from svdq_core.host.lora import LoraRow, apply_loras
    from svdq_core.host.patches import AdapterSettings

    quantized, _, plain, _ = models
    rows = [LoraRow(file("lora", f"{i}.safetensors"), 0.4) for i in range(3)]
    exact, _, reports = apply_loras(quantized, None, rows)
    short, _, short_reports = apply_loras(quantized, None, rows, AdapterSettings(recompress=0.001))
    assert (reports[-1].rank, short_reports[-1].rank) == (12, 4)
    # Both sets of factors are rounded to 16 bits, each in its own way.
    wanted = host.sample(exact)
    assert relative(host.sample(short), wanted) < 0.1 * relative(plain, wanted)


# How each tool names a LoRA on a projection, on q, k, v (fused, or the k alone) and on a single block's output.
DIALECTS = {
    "kohya": (
        ".lora_up.weight .lora_down.weight",
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_single_blocks_0_linear2",
    ),
    "diffusers, ai-toolkit": (
        ".lora_B.weight .lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_out.0",
        "transformer.transformer_blocks.0.attn.to_k",
        "transformer.single_transformer_blocks.0.proj_out",
    ),
    "BFL": (
        ".lora_B.weight .lora_A.weight",
        "diffusion_model.double_blocks.0.img_attn.proj",
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "diffusion_model.single_blocks.0.linear2",
    ),
    "XLabs": (
        ".up.weight .down.weight",
        "double_blocks.0.processor.proj_lora1",
        "double_blocks.0.processor.qkv_lora1",
        "single_blocks.0.processor.proj_lora",
    ),
    "OneTrainer": (
        ".lora_up.weight .lora_down.weight",
        "lora_transformer_transformer_blocks_0_attn_to_out_0",
        "lora_transformer_transformer_blocks_0_attn_to_k",
        "lora_transformer_single_transformer_blocks_0_proj_out",
    ),
    "SimpleTuner": (
        ".lora_up.weight .lora_down.weight",
        "lycoris_transformer_blocks_0_attn_to_out_0",
        "lycoris_transformer_blocks_0_attn_to_k",
        "lycoris_single_transformer_blocks_0_proj_out",
    ),
}
# The last blocks of FLUX.1, by which the host tells an XLabs file.
XLABS_ENDS = ("single_blocks.37.processor.qkv_lora", "double_blocks.18.processor.qkv_lora2")


def write_dialect(path, dialect, h):
    """A LoRA of rank 4 on three layers under a dialect's names."""
    random = torch.Generator().manual_seed(3)
    suffixes, proj, qkv, output = DIALECTS[dialect]
    up, down = suffixes.split()
    shapes = {proj: (h, h), qkv: (h if qkv.endswith("to_k") else 3 * h, h), output: (h, 5 * h)}
    if dialect == "XLabs":
        shapes |= dict.fromkeys(XLABS_ENDS, (3 * h, h))
    tensors = {}
    for name, (n, k) in shapes.items():
        tensors[name + up] = torch.randn((n, 4), generator=random) * 0.3
        tensors[name + down] = torch.randn((4, k), generator=random) * 0.3
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_means_the_same(host, models, flux_files, tmp_path, dialect):
    quantized, full, plain, plain_16 = models
    lora = write_dialect(tmp_path / "lora.safetensors", dialect, flux_files.hidden)
    adapted, report = host.apply_lora(quantized, lora, 1.0)
    assert "3 of 3 layers matched" in report
    wanted = host.sample(host.apply_lora(full, lora, 1.0)[0])
    found = host.sample(adapted)
    assert relative(wanted, plain_16) > 0.05, "it does something"
    assert relative(found, wanted) < 1.5 * relative(plain, plain_16)


def test_what_the_host_does_not_read_is_named(host, models, flux_files, tmp_path):
    """An XLabs file for a few blocks only: the host takes it for no dialect that it knows."""
    h = flux_files.hidden
    shapes = {"double_blocks.0.processor.proj_lora1": (h, h)}
    lora = make_lora(tmp_path / "xlabs.safetensors", shapes, "diffusers")
    with pytest.raises(CheckpointError, match=r"none of its 2 tensors fits this Flux model.*looks to be for FLUX"):
        host.apply_lora(models[0], lora, 1.0)


def test_shapes_of_another_model_are_refused(host, models, tmp_path):
    lora = make_lora(tmp_path / "large.safetensors", {UNET_QKV: (9216, 3072)})
    with pytest.raises(CheckpointError, match="1 of its layers are in this Flux model with other shapes"):
        host.apply_lora(models[0], lora, 1.0)


def test_some_shapes_that_do_not_fit_are_reported(host, models, flux_files, tmp_path):
    h = flux_files.hidden
    shapes = {UNET_QKV: (3 * h, h), "lora_unet_single_blocks_0_linear1": (99, h)}
    _, report = host.apply_lora(models[0], make_lora(tmp_path / "mixed.safetensors", shapes), 1.0)
    assert "1 of 2 layers matched" in report and "1 layers have other shapes and were left out" in report


def test_rank_0_and_truncation_are_refused(host, models, flux_files, tmp_path):
    h = flux_files.hidden
    empty = make_lora(tmp_path / "empty.safetensors", {UNET_QKV: (3 * h, h)}, rank=0)
    with pytest.raises(CheckpointError, match="of rank 0"):
        host.apply_lora(models[0], empty, 1.0)
    whole = make_lora(tmp_path / "whole.safetensors", {UNET_QKV: (3 * h, h)}).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        host.apply_lora(models[0], tmp_path / "cut.safetensors", 1.0)


def test_loras_can_be_left_out_of_a_file_and_put_on_again(host, models, file, tmp_path):
    """What Quantize Checkpoint does with bake_loras off."""
    from svdq_core.host.source import with_patches_of, without_patches
    from svdq_core.quantizer.pipeline import Settings, quantize_checkpoint

    full, plain = models[1], models[3]
    adapted = host.apply_lora(full, file("lora"), 1.0)[0]
    path = tmp_path / "bare.safetensors"
    quantize_checkpoint(host.source(without_patches(adapted)), path, Settings(recipe="fast"))
    bare = host.load(path)
    wanted = host.sample(adapted)
    assert relative(host.sample(bare), plain) < 0.15, "nothing of the LoRA is in the file"
    again = with_patches_of(bare, adapted)
    assert relative(host.sample(again), wanted) < 1.5 * relative(host.sample(bare), plain)
