"""What is compiled before a LoRA wants it, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from svdq_core.errors import SVDQuantError
from svdq_core.formats.comfy_quant import LAYOUTS
from svdq_core.kernels import ahead, library, plan


@pytest.mark.parametrize("capability", plan.ARCHITECTURES)
@pytest.mark.parametrize("rank", [40, 48, 64, 144, 400])
def test_any_longer_rank_finds_its_quantizer_compiled(capability: int, rank: int) -> None:
    builds = ahead.adapter_builds(capability, 100, True, LAYOUTS)
    card, shape, hopper = (capability, 132), (77, 12288, rank, True), capability == plan.HOPPER
    for unsigned, prologue in ((False, plan.PLAIN), (True, plan.PLAIN), (False, plan.ROTATE)):
        for output in (plan.IMAGE, plan.BYTES) if hopper else (plan.NIBBLES,):
            assert plan.quantize_launch(*card, *shape, unsigned, prologue, output).build in builds
    for output in (plan.WIDE if hopper else plan.CODES, plan.ABSMAX):
        assert plan.nvfp4_quantize_launch(*card, *shape, output).build in builds


def on_a_card(monkeypatch: pytest.MonkeyPatch, compile_) -> None:
    monkeypatch.setattr(ahead, "status", lambda device: (True, ""))
    properties = SimpleNamespace(major=8, minor=9, multi_processor_count=76)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(library, "prebuilt_code", lambda build, capability: None)
    monkeypatch.setattr(library, "machine_code", compile_)


def test_only_the_file_s_formats_in_the_model_s_type(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    on_a_card(monkeypatch, lambda build, capability: compiled.append((build, capability)))
    ahead.compile_for_adapters(torch.device("cuda"), torch.float16, ["svdquant_w8a8", "awq_w4a16"]).join()
    assert [(build.output, build.bf16, capability) for build, capability in compiled] == [(plan.ABSMAX, False, 89)]


def test_a_compiler_that_fails_fails_at_the_launch_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(build, capability):
        raise SVDQuantError("no compiler")

    on_a_card(monkeypatch, fail)
    ahead.compile_for_adapters(torch.device("cuda"), torch.bfloat16, ["svdquant_w4a4"]).join()


def test_nothing_happens_where_no_kernel_runs() -> None:
    assert ahead.compile_for_adapters(torch.device("cpu"), torch.bfloat16, LAYOUTS) is None
    assert ahead.compile_for_adapters(torch.device("cuda"), torch.float32, LAYOUTS) is None
