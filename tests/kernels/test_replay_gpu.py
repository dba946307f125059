"""Recording and replaying a denoiser's steps on a GPU."""

import gc

import pytest
import torch

from svdq_core.host import replay

pytestmark = pytest.mark.gpu


class Model(torch.nn.Module):
    """A denoiser of a few layers."""

    def __init__(self, sync=False):
        super().__init__()
        self.calls, self.sync = 0, sync
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(40))).cuda()

    def forward(self, x, timestep, transformer_options=None):
        self.calls += 1
        if self.sync and timestep.item() > 2:
            return x
        return self.layers(x * timestep)


class Executor:
    def __init__(self, class_obj):
        self.class_obj = class_obj

    def __call__(self, *args, **kwargs):
        return self.class_obj(*args, **kwargs)


class Patcher:
    hook_patches = None


def step(run, model, x, time):
    options = {"wrappers": {"diffusion_model": {replay.KEY: [None]}}}
    return run.step(Executor(model), (x, torch.tensor([time], device=x.device)), {"transformer_options": options})


@torch.inference_mode()
def test_replays_are_the_model_s_results():
    model, run = Model(), replay._Run(Patcher(), 20)
    inputs = [torch.randn(8, 64, device="cuda") for _ in range(6)]
    found = [step(run, model, x, 0.1 * i) for i, x in enumerate(inputs)]
    assert model.calls == 2, "one computed, one recorded"
    for i, (x, y) in enumerate(zip(inputs, found, strict=True)):
        assert torch.equal(y, model(x, torch.tensor([0.1 * i], device="cuda"))), "and none is written over"
    wide = [step(run, model, torch.ones(16, 64, device="cuda"), 0.5) for _ in range(3)]
    assert torch.equal(wide[0], wide[2])


@torch.inference_mode()
def test_a_model_that_waits_for_the_device_runs_as_ever():
    model, run = Model(sync=True), replay._Run(Patcher(), 20)
    x = torch.randn(8, 64, device="cuda")
    for i in range(5):
        assert torch.equal(step(run, model, x, float(i)), x if i > 2 else model.layers(x * i))
    assert torch.isfinite(model.layers(torch.randn_like(x))).all(), "the device is as it was"


@torch.inference_mode()
def test_an_interrupt_while_recording_goes_through():
    class Interrupt(Exception):
        pass

    model, run = Model(), replay._Run(Patcher(), 20)
    x = torch.randn(8, 64, device="cuda")
    step(run, model, x, 0.5)

    def interrupted(*args, **kwargs):
        raise Interrupt

    original, Model.forward = Model.forward, interrupted
    try:
        with pytest.raises(Interrupt):
            step(run, model, x, 0.5)
    finally:
        Model.forward = original
    assert torch.equal(step(run, model, x, 0.5), model.layers(x * 0.5))


@torch.inference_mode()
def test_a_model_in_main_memory_in_part_is_not_recorded():
    model, run = Model(), replay._Run(Patcher(), 20)
    model.extra = torch.nn.Parameter(torch.ones(3))
    for _ in range(4):
        step(run, model, torch.randn(8, 64, device="cuda"), 0.5)
    assert model.calls == 4


@torch.inference_mode()
def test_a_run_leaves_no_memory_behind():
    model, x = Model(), torch.randn(2**16, 64, device="cuda")

    def sample():
        run = replay._Run(Patcher(), 20)
        for _ in range(4):
            step(run, model, x, 0.5)

    def reserved():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    sample()
    before = reserved()
    for _ in range(3):
        sample()
    assert reserved() <= before
