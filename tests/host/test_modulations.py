"""FLUX's modulations, which the loader has computed at once."""

import pytest
import torch

from svdq_core.layers import Adapter


@pytest.fixture
def model(host, flux_files):
    """The small FLUX, quantized."""
    return host.load(flux_files.quantized)


def modules_of(model):
    flux = model.model.diffusion_model
    double = [module for block in flux.double_blocks for module in (block.img_mod, block.txt_mod)]
    return double + [block.modulation for block in flux.single_blocks]


def flat(outputs):
    """(shift, scale, gate) of one or two modulations."""
    return [part for out in outputs if out is not None for part in (out.shift, out.scale, out.gate)]


def assert_the_host_s(model, vec):
    """Each block is told what the host's module says."""
    modulations = model.model.diffusion_model.double_blocks[0].modulations
    for module in modules_of(model):
        found, expected = flat(modulations(module, vec)), flat(module(vec))
        assert len(found) == len(expected) == module.multiplier
        assert all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def embedding(flux_files, batch=1):
    return torch.randn(batch, flux_files.hidden).bfloat16()


@pytest.fixture
def calls(monkeypatch):
    """How many layers each evaluation had."""
    from svdq_core.host import modulations

    counts, evaluate = [], modulations.evaluate_together

    def counting(layers, x):
        counts.append(len(layers))
        return evaluate(layers, x)

    monkeypatch.setattr(modulations, "evaluate_together", counting)
    return counts


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_they_are_what_the_host_computes(model, flux_files, batch, inference):
    with torch.inference_mode(inference):
        assert_the_host_s(model, embedding(flux_files, batch))


def test_a_step_computes_them_at_once(host, model, calls):
    host.step(model)
    host.step(model)
    assert calls == [len(modules_of(model))] * 2


def test_another_embedding_has_others(model, flux_files, calls):
    vec = embedding(flux_files)
    assert_the_host_s(model, vec)
    assert_the_host_s(model, vec.clone() + 1)
    vec *= 2  # changed where it lies
    assert_the_host_s(model, vec)
    assert len(calls) == 3


def test_an_embedding_that_is_gone_leaves_nothing_behind(model, flux_files):
    modulations = model.model.diffusion_model.double_blocks[0].modulations
    vec = embedding(flux_files)
    modulations(modules_of(model)[0], vec)
    assert modulations._outputs
    del vec
    assert not modulations._outputs


def test_adapters_and_patched_biases_are_part_of_them(model, flux_files, calls):
    vec, modules = embedding(flux_files), modules_of(model)
    before = flat(modules[0](vec)), flat(modules[1](vec))
    out, hidden = modules[0].lin.out_features, flux_files.hidden
    modules[0].lin.set_adapter("a", Adapter(torch.randn(hidden, 4), torch.randn(out, 4)))
    modules[1].lin.bias_function = [lambda bias: bias + 1]
    try:
        assert_the_host_s(model, vec)
        assert not torch.equal(before[0][0], flat(modules[0](vec))[0])
        assert not torch.equal(before[1][0], flat(modules[1](vec))[0])
        assert calls == [len(modules) - 1], "a bias that is patched on the way is the host's"
    finally:
        modules[0].lin.set_adapter("a", None)
        modules[1].lin.bias_function = []


@pytest.mark.parametrize("of_the_layer", [False, True])
def test_a_hook_is_called(model, flux_files, of_the_layer):
    module = modules_of(model)[-1]
    modulations, vec, seen = model.model.diffusion_model.single_blocks[0].modulations, embedding(flux_files), []
    hook = (module.lin if of_the_layer else module).register_forward_hook(lambda *args: seen.append(args[1]))
    try:
        found = flat(modulations(module, vec))
        assert len(seen) == 1
        assert all(map(torch.equal, found, flat(module(vec))))
    finally:
        hook.remove()


def test_a_layer_elsewhere_is_the_host_s(model, flux_files, calls, monkeypatch):
    """As one is that was left in main memory."""
    layer = modules_of(model)[0].lin
    monkeypatch.setitem(layer._parameters, "weight", torch.nn.Parameter(layer.weight.to("meta"), requires_grad=False))
    model.model.diffusion_model.single_blocks[0].modulations(modules_of(model)[-1], embedding(flux_files))
    assert calls == [len(modules_of(model)) - 1]


def load_with(host, flux_files, path, modulations):
    """The small FLUX in INT4, with modulations of another precision."""
    from svdq_core.quantizer.pipeline import Settings, quantize_checkpoint

    settings = Settings("int4", "fast", modulations=modulations)
    quantize_checkpoint(host.source(host.load_16bit(flux_files.full)), path, settings)
    return host.load(path)


def test_int8_modulations_are_computed_at_once(host, flux_files, tmp_path, calls):
    model = load_with(host, flux_files, tmp_path / "int8.safetensors", "int8")
    vec, modules = embedding(flux_files, 3), modules_of(model)
    assert_the_host_s(model, vec)
    assert calls == [len(modules)]
    out, hidden = modules[0].lin.out_features, flux_files.hidden
    modules[0].lin.set_adapter("a", Adapter(torch.randn(hidden, 4), torch.randn(out, 4)))
    assert_the_host_s(model, vec.clone())
    assert calls == [len(modules), len(modules) - 1], "a layer with a branch is the host's"


def test_16_bit_modulations_are_the_host_s(host, flux_files, tmp_path, calls):
    model = load_with(host, flux_files, tmp_path / "16bit.safetensors", "16bit")
    assert torch.isfinite(host.step(model)).all()
    assert_the_host_s(model, embedding(flux_files))
    assert not calls


def test_compiled_code_has_each_for_itself(model, flux_files, calls):
    module = modules_of(model)[0]
    modulations, vec = model.model.diffusion_model.double_blocks[0].modulations, embedding(flux_files)
    compiled = torch.compile(lambda vec: flat(modulations(module, vec)), backend="eager", fullgraph=True)
    assert all(map(torch.equal, compiled(vec), flat(module(vec))))
    assert not calls
