"""Which calls of a denoiser are recorded and replayed; the recording itself is tested on a GPU."""

import pytest
import torch

from svdq_core.host import replay
from svdq_core.ops.cuda import release


class Model(torch.nn.Module):
    """A denoiser: what it gives depends on all that it is given."""

    def __init__(self):
        super().__init__()
        self.calls, self.weight = 0, torch.nn.Parameter(torch.ones(4))

    def forward(self, x, timestep, context=None, control=None, transformer_options=None, **kwargs):
        self.calls += 1
        extra = sum(kwargs.values()) if kwargs else 0
        if control:
            extra = extra + control["input"].pop(0)  # as the host's models do
        return x * self.weight + timestep + (0 if context is None else context.sum()) + extra


class Executor:
    """As the host's, around the model or a sampler."""

    def __init__(self, function, class_obj):
        self._function, self.class_obj = function, class_obj

    def __call__(self, *args, **kwargs):
        return self._function(*args, **kwargs)


class Patcher:
    hook_patches = None


def rebuilt(kwargs):
    """The same tensors in lists of their own, which a model may change."""
    tensors = []
    replay._signature(kwargs, tensors)
    return replay._with_tensors(kwargs, iter(tensors))


@pytest.fixture
def recordings(monkeypatch):
    """Recording a call for a machine without a GPU: a graph that repeats it on the recorded tensors."""
    made = []

    class Graph:
        def __init__(self, model, args, kwargs, output):
            self._call, self._output = (model, args, kwargs), output

        def replay(self):
            model, args, kwargs = self._call
            kwargs = rebuilt(kwargs)
            calls = model.calls
            self._output.copy_(model(*args, **kwargs))
            model.calls = calls

    def record(self, executor, args, kwargs, tensors, output):
        inputs = [tensor.clone() for tensor in tensors]
        args, kwargs = replay._with_tensors((args, kwargs), iter(inputs))
        made.append(args)
        return replay._Graph(Graph(executor.class_obj, args, kwargs, output), inputs, output)

    monkeypatch.setattr(replay._Run, "_record", record)
    return made


@pytest.fixture
def sample():
    """A run of so many steps, in which a function is called with the wrapped model for each."""

    def run(work, steps=8, model=None, patcher=None):
        model, wrappers = model or Model(), replay.StepReplay()
        guider = type("Guider", (), {"model_patcher": patcher or Patcher()})()

        def call(*args, options=None, **kwargs):
            options = {"wrappers": {"diffusion_model": {replay.KEY: [wrappers.diffusion_model]}}} | (options or {})
            executor = Executor(model, model)
            return wrappers.diffusion_model(executor, *args, transformer_options=options, **kwargs)

        def sampler(noise, latent, sampler, sigmas):
            return [work(call, step) for step in range(len(sigmas) - 1)]

        results = wrappers.outer_sample(Executor(sampler, guider), None, None, None, torch.linspace(1, 0, steps + 1))
        return model, results

    return run


def step_of(call, step, **others):
    return call(torch.full((2, 4), float(step)), torch.tensor([step + 0.5]), **others)


def expected(step):
    return torch.full((2, 4), 2 * step + 0.5)


def test_the_second_step_is_recorded_and_the_others_replayed(sample, recordings):
    model, results = sample(step_of)
    assert len(recordings) == 1 and model.calls == 1, "the first step computes as ever"
    for step, result in enumerate(results):
        assert torch.equal(result, expected(step)), "each has its own output"


def test_a_short_run_is_not_worth_it(sample, recordings):
    model, _ = sample(step_of, steps=5)
    assert not recordings and model.calls == 5


def test_each_kind_of_call_has_its_own_recording(sample, recordings):
    def both(call, step):
        return step_of(call, step, context=torch.ones(3)), step_of(call, step, options={"cond_or_uncond": [1, 0]})

    _, results = sample(both)
    assert len(recordings) == 2
    for step, (with_context, without) in enumerate(results):
        assert torch.equal(with_context, expected(step) + 3) and torch.equal(without, expected(step))


def test_other_numbers_and_shapes_are_other_calls(sample, recordings):
    def growing(call, step):
        return step_of(call, 0, strength=float(step // 4))

    _, results = sample(growing)
    assert len(recordings) == 2
    assert [result[0, 0].item() for result in results] == [0.5] * 4 + [1.5] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"patches": {"attn1_patch": [print]}},
        {"patches_replace": {"dit": {("double_block", 0): print}}},
        {"optimized_attention_override": print},
        {"prefetch_dynamic_vbars": True},
        {"wrappers": {"diffusion_model": {"somebody": [print]}}},
    ],
)
def test_who_has_a_part_in_a_step_is_asked_at_every_one(sample, recordings, options):
    model, _ = sample(lambda call, step: step_of(call, step, options=options))
    assert not recordings and model.calls == 8


def test_empty_patches_are_none(sample, recordings):
    options = {"patches": {"attn1_patch": []}, "patches_replace": {"dit": {}}, "sigmas": torch.ones(1), "uuids": [3]}
    options["prefetch_dynamic_vbars"] = False  # as newer hosts say
    sample(lambda call, step: step_of(call, step, options=options))
    assert recordings


def test_a_controlnet_s_part_is_an_input(sample, recordings):
    def controlled(call, step):
        control = {"input": [torch.full((4,), 10.0 * step), None], "output": []}
        return step_of(call, step, control=control if step < 6 else None)

    _, results = sample(controlled)
    assert len(recordings) == 2
    for step, result in enumerate(results):
        assert torch.equal(result, expected(step) + (10 * step if step < 6 else 0))


def test_hooks_and_functions_in_the_model_s_place_are_not_recorded(sample, recordings):
    patcher = Patcher()
    patcher.hook_patches = {"hook": {}}
    model, _ = sample(step_of, patcher=patcher)
    assert model.calls == 8
    model = Model()
    forward, model.replaced = model.forward, 0

    def replacement(*args, **kwargs):
        model.replaced += 1
        return forward(*args, **kwargs)

    model.forward = replacement
    sample(step_of, model=model)
    assert model.replaced == 8 and not recordings


def test_a_layer_that_changes_ends_a_recording(sample, recordings):
    def changing(call, step):
        if step == 4:
            release(())
        return step_of(call, step)

    model, results = sample(changing)
    assert len(recordings) == 2 and model.calls == 2
    assert all(torch.equal(result, expected(step)) for step, result in enumerate(results))


def test_recordings_end_with_their_run(sample, recordings):
    model = Model()
    sample(step_of, model=model)
    sample(step_of, model=model)
    assert len(recordings) == 2


def test_without_a_gpu_everything_is_as_ever(sample):
    model, results = sample(step_of)
    assert model.calls == 8
    assert all(torch.equal(result, expected(step)) for step, result in enumerate(results))


def test_a_call_outside_of_a_run_is_as_ever():
    model, wrappers = Model(), replay.StepReplay()
    out = wrappers.diffusion_model(Executor(model, model), torch.ones(4), torch.zeros(1), transformer_options={})
    assert torch.equal(out, torch.ones(4))
