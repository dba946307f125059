"""FLUX's blocks, of which the loader fuses what lies between the linear layers."""

import pytest
import torch
from in_process import LATENT, relative


@pytest.fixture(scope="module")
def model(host, flux_files):
    """The small FLUX, quantized."""
    return host.load(flux_files.quantized)


@pytest.fixture
def unfused(model, monkeypatch):
    """The same with the host's blocks: a function that runs something meanwhile."""
    from svdq_core.host import flux

    def run(work, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(flux, "_is_plain", lambda *arguments: False)
            return work(*arguments, **options)

    return run


@torch.inference_mode()
def step(host, model, batch=1, **options):
    """One call of the denoiser; the images of a batch differ in everything."""
    random = torch.Generator().manual_seed(2)
    tokens, extra = host.conditioning()[0]
    return model.model.apply_model(
        torch.randn((batch, *LATENT[1:]), generator=random),
        torch.linspace(0.9, 0.3, batch),
        c_crossattn=torch.randn((batch, *tokens.shape[1:]), generator=random),
        y=torch.randn((batch, extra["pooled_output"].shape[1]), generator=random),
        transformer_options=options,
    )


def blocks(model):
    flux = model.model.diffusion_model
    return [*flux.double_blocks, *flux.single_blocks]


@pytest.mark.parametrize("batch", [1, 3])
def test_they_compute_what_the_host_s_compute(host, model, unfused, batch):
    ours, theirs = step(host, model, batch), unfused(step, host, model, batch)
    assert not torch.equal(ours, theirs), "rounded in other places"
    assert relative(ours, theirs) < 0.02


def test_a_masked_attention_is_masked(host, model, unfused):
    """Parts of a prompt that are for parts of the image, as some nodes ask for, by the attention's override."""

    def half(function, q, k, v, heads, **kwargs):
        kwargs["mask"] = torch.arange(k.shape[2], device=k.device).lt(k.shape[2] // 2).expand(q.shape[2], -1)
        return function(q, k, v, heads, **kwargs)

    ours = step(host, model, optimized_attention_override=half)
    assert relative(ours, step(host, model)) > 0.02, "the override is called"
    assert relative(ours, unfused(step, host, model, optimized_attention_override=half)) < 0.02


def test_a_model_in_16_bits_is_left_alone(host, flux_files, model):
    fused = [type(block).__name__ for block in blocks(model)]
    plain = [type(block).__name__ for block in blocks(host.load_16bit(flux_files.full))]
    assert fused == [f"Fused{name}" for name in plain]


@pytest.mark.parametrize(("part", "columns"), [("img_mlp.1", 4), ("txt_mlp.2", 4), ("img_mlp", 1), ("linear2", 5)])
def test_who_hooks_a_gelu_or_what_follows_it_sees_it(host, model, part, columns):
    before, seen = step(host, model), []
    block = blocks(model)[-1 if part == "linear2" else 0]
    hook = block.get_submodule(part).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    try:
        found = step(host, model)
    finally:
        hook.remove()
    assert [x.shape[-1] for x in seen] == [columns * block.hidden_size]
    assert relative(found, before) < 0.02


def test_a_patch_inside_a_block_has_the_host_s_run(host, model, unfused):
    """Newer hosts apply such patches in a block; this one does not, but its own block runs."""
    patches = {"attn1_patch": [lambda *args, **kwargs: {}]}
    ours = step(host, model, patches=patches)
    assert torch.equal(ours, unfused(step, host, model, patches=patches))
    assert not torch.equal(ours, step(host, model, patches={"attn1_patch": []}))


@pytest.mark.parametrize("extra", [{}, {"modulation_dims": [(0, 4, 0), (4, 8, 1)]}])
def test_other_modulations_have_the_host_s_run(model, extra):
    """One for each token, and those of newer hosts, whose images may have tokens of two times."""
    block = blocks(model)[1]
    x, vec = torch.randn(1, 8, block.hidden_size), torch.randn(1, 2, block.hidden_size)
    if not extra:
        vec = vec.repeat(1, 4, 1)
    pe = torch.eye(2).expand(1, 1, 8, 64, 2, 2).contiguous()
    with torch.inference_mode():
        found, expected = (type(block).__mro__[i].forward(block, x.clone(), vec, pe, **extra) for i in (0, 1))
    assert torch.equal(found, expected)


def test_a_node_that_replaces_a_block_may_run_it(host, model):
    calls = []

    def replacement(args, extra):
        calls.append(args["img"].shape)
        return extra["original_block"](args)

    options = {"patches_replace": {"dit": {("double_block", 0): replacement, ("single_block", 0): replacement}}}
    assert torch.equal(step(host, model, **options), step(host, model))
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_epsilon_that_a_newer_host_leaves_to_torch(host, dtype):
    from svdq_core.host.flux import torch_epsilon

    x = torch.randn(4, 64) * 0.01
    expected = torch.nn.functional.rms_norm(x.to(dtype), (64,)).double()
    found = x.to(dtype).double() * (x.to(dtype).double().square().mean(-1, keepdim=True) + torch_epsilon(dtype)).rsqrt()
    assert relative(found, expected) < 0.01


def test_a_function_that_another_pack_puts_in_the_host_s_class_runs(host, model, monkeypatch):
    from comfy.ldm.flux.layers import SingleStreamBlock

    def forward(self, x, *args, **kwargs):
        return x

    before = step(host, model)
    with monkeypatch.context() as patch:
        patch.setattr(SingleStreamBlock, "forward", forward)
        assert relative(step(host, model), before) > 0.05
    assert torch.equal(step(host, model), before)
