"""What lies between a FLUX block's linear layers: the references against float64, and how torch sees them."""

import pytest
import torch

from svdq_core.ops import block

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
EPSILON = 1e-5


def normal(*shape, dtype=torch.float32, scale=1.0, shift=0.0, device="cpu"):
    return (torch.randn(shape, device=device) * scale + shift).to(dtype)


def norm_operands(dtype, batch=2, length=5, columns=72, device="cpu"):
    """x, y, and rows of a modulation's output: gate, scale and shift."""
    x, y = (normal(batch, length, columns, dtype=dtype, shift=0.5, device=device) for _ in range(2))
    return x, y, *normal(batch, 1, 3 * columns, dtype=dtype, device=device).chunk(3, dim=-1)


def rope_of(tokens, head, batch=1, device="cpu"):
    """A rotation for every token and pair."""
    angle = torch.rand(batch, 1, tokens, head // 2, device=device) * 6
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))


def rope_operands(dtype, lengths=(3, 5), heads=3, head=64, batch=2, extra=16, rope_batch=1, device="cpu"):
    """qkv in views of something wider, the norms' weights, rotations, heads, epsilon."""
    width = 3 * heads * head
    qkv = [normal(batch, n, width + extra, dtype=dtype, device=device)[..., :width] for n in lengths]
    norms = [[normal(head, dtype=dtype, shift=1, scale=0.3, device=device) for _ in lengths] for _ in range(2)]
    return qkv, *norms, rope_of(sum(lengths), head, rope_batch, device), heads, EPSILON


def in_float64(name, *operands):
    """The operator's results, in float64 throughout."""

    def double(operand):
        if isinstance(operand, list):
            return [double(part) for part in operand]
        return operand.double() if isinstance(operand, torch.Tensor) else operand

    def norm(x, scale, shift, epsilon):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + epsilon).sqrt()
        return x * (1 + scale) + shift

    def rope(qkv, norm_q, norm_k, factors, heads, epsilon):
        parts = []
        for x, weight_q, weight_k in zip(qkv, norm_q, norm_k, strict=True):
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in x.chunk(3, dim=-1))
            q, k = (
                part / (part.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight
                for part, weight in ((q, weight_q), (k, weight_k))
            )
            parts.append((q, k, v))
        q, k, v = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
        q, k = ((factors @ part.unflatten(-1, (-1, 2))[..., None]).flatten(-3) for part in (q, k))
        return q, k, v

    operands = [double(operand) for operand in operands]
    if name == "norm_modulate":
        return (norm(*operands),)
    if name == "norm_rope":
        return rope(*operands)
    if name == "gelu_concat":
        a, b = operands
        return (torch.cat((a, torch.nn.functional.gelu(b, approximate="tanh")), dim=-1),)
    x, y, gate, *rest = operands
    return (x + gate * y, *([norm(x + gate * y, *rest)] if rest else []))


def assert_near(name, operands, tolerance):
    """Every result within a relative error of float64's, in the operands' type and contiguous."""
    found = getattr(block, name)(*operands)
    first = operands[0][0] if name == "norm_rope" else operands[0]
    for got, want in zip(found if isinstance(found, tuple) else (found,), in_float64(name, *operands), strict=True):
        assert got.shape == want.shape and got.dtype == first.dtype
        assert (got.transpose(1, 2) if name == "norm_rope" else got).is_contiguous()
        assert torch.isfinite(got).all()
        assert torch.linalg.norm(got.double() - want) < tolerance * torch.linalg.norm(want)


def cases(dtype, **where):
    x, y, gate, scale, shift = norm_operands(dtype, **where)
    a = normal(2, 3, 40, dtype=dtype, **where)
    return {
        "norm_modulate": (x, scale, shift, EPSILON),
        "gated_sum": (x, y, gate),
        "gated_norm_modulate": (x, y, gate, scale, shift, EPSILON),
        "norm_rope": rope_operands(dtype, **where),
        "gelu_concat": (a, normal(2, 3, 104, dtype=dtype, **where)[..., 24:]),
    }


NAMES = list(cases(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_reference_matches_float64(name, dtype):
    assert_near(name, cases(dtype)[name], TOLERANCE[dtype])


@pytest.mark.parametrize("name", NAMES)
def test_operators_satisfy_torch(name):
    torch.library.opcheck(
        getattr(torch.ops.svdq, name), cases(torch.float32)[name], test_utils=("test_schema", "test_faketensor")
    )


def test_sums_in_fp16_stay_finite():
    x, y = torch.full((1, 1, 8), 6e4).half(), torch.full((1, 1, 8), 3.0).half()
    gate = torch.tensor([1e4, -6e4, 0, 1, float("inf"), float("nan"), 2e4, 0]).half().view(1, 1, 8)
    found = block.gated_sum(x, y, gate).flatten()
    largest = torch.finfo(torch.float16).max
    assert found[[0, 1, 4, 5]].tolist() == [largest, -largest, largest, 0]
    assert torch.equal(found[2], x[0, 0, 2]) and torch.isfinite(found).all()


def test_only_the_heads_of_q_and_k_are_normed():
    qkv, norm_q, norm_k, rope, heads, _ = rope_operands(torch.float32, lengths=(4,))
    q, k, v = block.norm_rope([x * 100 for x in qkv], norm_q, norm_k, rope, heads, 0.0)
    again = block.norm_rope(qkv, norm_q, norm_k, rope, heads, 0.0)
    torch.testing.assert_close((q, k), again[:2])
    torch.testing.assert_close(v, 100 * again[2])
