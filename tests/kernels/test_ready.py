"""Layers made ready once launch what their two halves would, and stay ready only while their tensors are the same."""

import gc
import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from emulated import use_card

from svdq_core.errors import SVDQuantError
from svdq_core.kernels import int8, launch, nvfp4, plan, ready, w4a4
from svdq_core.kernels.kept import Kept
from svdq_core.ops.cuda import release

M, K, N = 70, 192, 136
Call = tuple  # (build, grid, threads, shared memory, arguments)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What is launched on a card that is not there: tensors are on the CPU, and nothing is computed."""
    calls: list[Call] = []

    def kernel_of(index: int, build: plan.Build, grid: tuple, shared: int) -> launch.Kernel:
        def start(function, grid, threads, shared, stream, arguments, early):
            calls.append((build, grid, threads, shared, arguments))

        return launch.Kernel(start, 0, grid, build.threads, shared)

    use_card(monkeypatch, kernel_of, (89, 128))
    return calls


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def operands_of(name: str, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    common = {
        "smooth_factor": torch.ones(K, dtype=dtype),
        "proj_down": torch.zeros(K, rank, dtype=dtype),
        "weight": random_codes(N, K if name == "int8" else K // 2),
    }
    scales = {
        "int4": {"weight_scale": torch.ones(K // 64, N, dtype=dtype)},
        "int8": {"weight_scale": torch.ones(N)},
        "nvfp4": {
            "weight_scale": torch.ones(K // 16, N).to(torch.float8_e4m3fn),
            "weight_tensor_scale": torch.ones(()),
            "weight_channel_scale": torch.ones(N, dtype=dtype),
        },
    }
    return common | scales[name] | {"proj_up": torch.zeros(N, rank, dtype=dtype), "bias": torch.zeros(N, dtype=dtype)}


def halves(name: str) -> Callable[..., torch.Tensor]:
    """The layer by its two functions, each of which makes its outputs tensors of their own."""

    def int4(x, smooth_factor, proj_down, *weights):
        return launch.gemm(*launch.quantize(x, smooth_factor, proj_down, False), *weights, False)

    def others(module):
        def layer(x, smooth_factor, proj_down, *weights):
            return module.multiply(*module.quantize(x, smooth_factor, proj_down), *weights)

        return layer

    return {"int4": int4, "nvfp4": others(nvfp4), "int8": others(int8)}[name]


def linear(name: str) -> Callable[..., torch.Tensor]:
    return {
        "int4": lambda *operands: w4a4.linear(*operands, False),
        "nvfp4": nvfp4.linear,
        "int8": int8.linear,
    }[name]


def words(call: Call) -> list[int]:
    arguments = call[-1]
    return [int.from_bytes(arguments[i : i + 4], "little") for i in range(0, len(arguments), 4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 16, 40])
@pytest.mark.parametrize("name", ["int4", "nvfp4", "int8"])
def test_launches_what_its_halves_do(name: str, rank: int, dtype: torch.dtype, launched: list[Call]) -> None:
    """The same kernels in the same order, told the same: but for where what passes between them is."""
    operands = operands_of(name, rank, dtype)
    for m in (M, 9, M):
        x = torch.zeros(m, K, dtype=dtype)
        expected_y = halves(name)(x, *operands.values())
        expected = launched.copy()
        launched.clear()
        y = linear(name)(x, *operands.values())
        assert (y.shape, y.dtype) == (expected_y.shape, expected_y.dtype)
        assert [call[:-1] for call in launched] == [call[:-1] for call in expected]
        known = {tensor.data_ptr() for tensor in (x, *operands.values()) if tensor.numel()}
        for mine, other in zip(launched, expected, strict=True):
            pairs = list(zip(words(mine), words(other), strict=True))
            # Where words differ is an address: of no operand, and of nothing only where there are no ranks.
            for i in (i for i, (one, two) in enumerate(pairs) if one != two):
                first = i - i % 2
                for call in (mine, other):
                    address = int.from_bytes(call[-1][4 * first : 4 * first + 8], "little")
                    assert address > 2**32 or (address, rank) == (0, 0)
                    assert address not in known
        launched.clear()


@pytest.mark.parametrize("name", ["int4", "nvfp4", "int8"])
def test_what_passes_between_kernels_does_not_overlap(name: str, launched: list[Call], monkeypatch) -> None:
    """In a room made as large as was asked for: every piece has its bytes before the next one begins."""
    x, operands = torch.zeros(M, K, dtype=torch.float16), operands_of(name, 40, torch.float16)
    made: list[ready.Launches] = []
    laid_out = ready.Launches.laid_out.__func__
    asked: dict[str, int] = {}

    def watched(cls, quantize, multiply, **sizes):
        asked.update(sizes)
        made.append(laid_out(cls, quantize, multiply, **sizes))
        return made[-1]

    monkeypatch.setattr(ready.Launches, "laid_out", classmethod(watched))
    linear(name)(x, *operands.values())
    launches = made[0]
    begins = {"codes": 0, "scale": launches.scale, "down": launches.down, "rest": launches.rest}
    if launches.down_scale is not None:
        begins["down_scale"] = launches.down_scale
    pieces = sorted((begin, begin + asked.get(piece, 0)) for piece, begin in begins.items())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(pieces))
    assert pieces[-1][1] <= launches.room
    assert all(begin % 16 == 0 for begin, _ in pieces)
    quantized = {"int4": launch.quantize, "nvfp4": nvfp4.quantize, "int8": int8.quantize}[name]
    more = (False,) if name == "int4" else ()
    tensors = quantized(x, operands["smooth_factor"], operands["proj_down"], *more)
    for piece, tensor in zip(("codes", "scale", "down", "down_scale"), tensors, strict=False):
        assert asked.get(piece, 0) == (0 if tensor is None else tensor.nbytes)


def test_an_input_that_does_not_fit_is_refused(launched: list[Call]) -> None:
    operands = operands_of("int4", 16, torch.bfloat16)
    w4a4.linear(torch.zeros(M, K).bfloat16(), *operands.values(), False)
    launched.clear()
    for x, message in (
        (torch.zeros(M, K).half(), "smooth_factor is torch.bfloat16, expected torch.float16"),
        (torch.zeros(M, 2 * K).bfloat16(), "smooth_factor has shape"),
        (torch.zeros(2, M, K).bfloat16(), r"expected \(M, K\)"),
        (torch.zeros(K, M).bfloat16().t(), "x has strides"),
        (torch.zeros(M * K + 1).bfloat16()[1:].view(M, K), "16-byte boundary"),
    ):
        with pytest.raises(SVDQuantError, match=message):
            w4a4.linear(x, *operands.values(), False)
    assert not launched


def test_few_sizes_are_kept(launched: list[Call]) -> None:
    """A server sees inputs of ever new lengths."""
    operands = operands_of("int4", 16, torch.bfloat16)
    for m in range(1, 3 * ready.MOST_SIZES):
        w4a4.linear(torch.zeros(m, K).bfloat16(), *operands.values(), False)
    layer = w4a4._FORMS[False, False][0].of(operands["weight"])
    assert 0 < len(layer._launches) <= ready.MOST_SIZES
    assert len(launched) == 2 * (3 * ready.MOST_SIZES - 1)


def test_nothing_is_launched_for_no_rows(launched: list[Call]) -> None:
    for name in ("int4", "nvfp4", "int8"):
        y = linear(name)(torch.zeros(0, K).bfloat16(), *operands_of(name, 16, torch.bfloat16).values())
        assert y.shape == (0, N)
    assert not launched


# ---- what is kept


def test_kept_while_all_tensors_are_the_same() -> None:
    kept: Kept[list] = Kept()
    weight, scale = torch.ones(4), torch.ones(2)
    operands = weight, scale, None
    made = ["of these"]
    assert kept.get(weight, operands) is None
    kept.put(weight, operands, made)
    assert kept.get(weight, operands) is made
    assert kept.get(weight, (weight, scale.clone(), None)) is None, "another tensor"
    assert kept.get(weight, (weight, None, scale)) is None, "another place"
    assert kept.get(weight, operands) is made
    scale.mul_(2)
    assert kept.get(weight, operands) is None, "changed in place"
    assert kept.of(weight) is made
    kept.put(weight, operands, made)
    weight.data = torch.zeros(4)
    assert kept.get(weight, operands) is None, "it is elsewhere"
    kept.forget(weight)
    assert kept.of(weight) is None
    kept.forget(weight)


def test_what_is_released_is_kept_nowhere() -> None:
    """A layer that leaves the card takes along what was made of it, whoever keeps that."""
    weight, other = torch.ones(4), torch.ones(4)
    several: list[Kept[int]] = [Kept(), Kept()]
    for kept in several:
        kept.put(weight, (weight,), 1)
        kept.put(other, (other,), 2)
    release((weight,))
    assert [kept.of(weight) for kept in several] == [None, None]
    assert [kept.of(other) for kept in several] == [2, 2]


def test_inference_tensors_are_kept_by_place() -> None:
    kept: Kept[int] = Kept()
    with torch.inference_mode():
        weight = torch.ones(4)
    kept.put(weight, (weight,), 1)
    assert kept.get(weight, (weight,)) == 1


@pytest.mark.parametrize("dies", [0, 1])
def test_let_go_when_a_tensor_dies(dies: int) -> None:
    """Whichever it is: what was made may hold memory of a card."""

    class Made:
        pass

    kept: Kept[Made] = Kept()
    tensors = [torch.ones(4), torch.ones(2)]
    weight = tensors[0]
    made = Made()
    kept.put(weight, tuple(tensors), made)
    seen = weakref.ref(made)
    del made
    gc.disable()
    try:
        assert seen() is not None
        if dies == 0:
            del weight
        del tensors[dies]
        assert seen() is None
    finally:
        gc.enable()


def test_the_death_of_a_former_operand_takes_nothing_away() -> None:
    kept: Kept[int] = Kept()
    weight, first, second = torch.ones(4), torch.ones(2), torch.ones(2)
    kept.put(weight, (weight, first), 1)
    kept.put(weight, (weight, second), 2)
    del first
    assert kept.get(weight, (weight, second)) == 2
