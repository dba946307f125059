"""Changes of a weight as low-rank factors: within the bound, no longer than needed; and what a file is for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdq_core.lora.fit import fit, recompress
from svdq_core.lora.origin import looks_like


def product(rank, n=96, k=160, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn((n, rank), generator=random) @ torch.randn((rank, k), generator=random)


@pytest.mark.parametrize("rank", [1, 4, 16, 17, 40])
def test_a_low_rank_change_is_found_exactly(rank):
    delta = product(rank)
    adapter = fit(delta, 1e-4, 64)
    assert adapter.delta is None
    assert adapter.up.shape == (96, rank) and adapter.down.shape == (160, rank)
    assert torch.linalg.norm(delta - adapter.up @ adapter.down.t()) <= 1e-4 * torch.linalg.norm(delta)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), bound=st.floats(0.005, 0.5), decay=st.floats(0.5, 3))
def test_a_fit_keeps_its_bound_with_the_least_rank(seed, bound, decay):
    random = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn((n, 48), generator=random)).Q for n in (64, 48))
    values = torch.arange(1, 49) ** -decay
    delta = left * values @ right.t()
    adapter = fit(delta, bound, 48)
    size = torch.linalg.norm(delta)
    tail = values.square().flip(0).cumsum(0).flip(0).sqrt()
    least = int((tail > bound * size).sum())
    if adapter.delta is not None:
        assert torch.equal(adapter.delta, delta)
        assert least > 48 * 64 // (48 + 64) - 2, "dense only where factors would be as large"
    else:
        assert torch.linalg.norm(delta - adapter.up @ adapter.down.t()) <= bound * size * 1.0001
        assert adapter.up.shape[1] <= least + 1


def test_what_no_rank_fits_is_kept_whole():
    delta = torch.randn(64, 64)
    adapter = fit(delta, 0.01, 256)
    assert adapter.up.shape[1] == 0 and torch.equal(adapter.delta, delta)


def test_nothing_costs_nothing():
    adapter = fit(torch.zeros(32, 48), 0.01, 16)
    assert adapter.delta is None and adapter.up.shape == (32, 0)


def test_recompression_finds_what_loras_share():
    random = torch.Generator().manual_seed(1)
    up, down = torch.randn((96, 8), generator=random), torch.randn((160, 8), generator=random)
    # The same LoRA three times, and a faint one.
    ups = torch.cat([up, up, -0.5 * up, 1e-4 * torch.randn((96, 8), generator=random)], 1)
    downs = torch.cat([down, down, down, torch.randn((160, 8), generator=random)], 1)
    down_8, up_8 = recompress(downs, ups, 0.01)
    whole = ups @ downs.t()
    assert up_8.shape[1] == 8
    assert torch.linalg.norm(up_8 @ down_8.t() - whole) <= 0.01 * torch.linalg.norm(whole)
    down_all, up_all = recompress(downs, ups, 0.0)
    assert torch.allclose(up_all @ down_all.t(), whole, atol=1e-3)


@pytest.mark.parametrize(
    ("keys", "model"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)}, "FLUX"),
        ({"transformer.single_transformer_blocks.0.proj_out.lora_A.weight": (4, 15360)}, "FLUX"),
        ({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)}, "SDXL"),
        ({"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 768)}, "SD 1.5"),
        ({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)}, "a text encoder only"),
        ({"a": (1,)}, "no model known here"),
    ],
)
def test_says_which_model_a_file_is_for(keys, model):
    assert looks_like(keys) == model
