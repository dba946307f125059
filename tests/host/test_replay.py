"""Replayed steps in ComfyUI: who is asked, and that images are what they are without. The recording needs a GPU."""

import pytest
import torch

from svdq_core.host import replay


@pytest.fixture
def model(host, flux_files):
    """The small FLUX, quantized."""
    return host.load(flux_files.quantized)


@pytest.fixture
def asked(monkeypatch):
    """For each call in a run, whether it may be recorded."""
    answers, step = [], replay._Run.step

    def asking(self, executor, args, kwargs):
        answers.append(replay._signature((args, kwargs), []) is not None)
        return step(self, executor, args, kwargs)

    monkeypatch.setattr(replay._Run, "step", asking)
    return answers


def test_a_plain_step_may_be_recorded(host, model, asked):
    replayed = replay.replay_steps(replay.replay_steps(model))
    assert torch.equal(host.sample(replayed), host.sample(model))
    assert asked == [True] * host.steps, "once for each step, however often it was asked for"


def test_it_stays_with_clones_and_off_other_models(host, model, asked):
    host.sample(host.model_sampling_flux(replay.replay_steps(model)))
    assert len(asked) == host.steps
    host.sample(model)
    assert len(asked) == host.steps


def test_patches_of_other_nodes_are_run(host, model, asked):
    calls = []

    def patch(args):
        calls.append(1)
        return args

    replayed = replay.replay_steps(model)
    replayed.set_model_patch(patch, "post_input")
    host.sample(replayed)
    assert asked == [False] * host.steps and len(calls) == host.steps
