"""Checks arguments, allocates outputs, and launches the kernels on the current stream.

Every check comes before any launch, and says which operand is wrong and how. Between the checks and the
launch there is little: this runs some five hundred times a diffusion step.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch

from ..errors import SVDQuantError
from . import driver, library, plan

# The INT4 kernels' Arguments structures, as the compiler lays them out.
QUANTIZE = struct.Struct("6P6i2P2i3P2i")
GEMM = struct.Struct("8P4i5P2i3Pfi0P")
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
_RANK_STEP = 8  # ranks that fill 16 bytes
_DOWN_STEP = 64  # columns of ``down`` that a product takes at once, where it has 16 bits


class KernelInputError(SVDQuantError, ValueError):
    """An operand that no kernel takes."""


@lru_cache(maxsize=64)
def card(index: int) -> tuple[int, int]:
    """(10 * major + minor, multiprocessors) of a device."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


@lru_cache(maxsize=1)
def _device_count() -> int:
    return torch.cuda.device_count()


class Kernel(NamedTuple):
    """A loaded kernel and the shape of its launch."""

    start: Callable[..., None]
    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    early: bool = False  # it waits itself for the kernel before

    def launch(self, stream: int, arguments: bytes) -> None:
        self.start(self.function, self.grid, self.threads, self.shared, stream, arguments, self.early)


def starts_early(index: int) -> bool:
    """Whether a device starts kernels before the one in front has ended (``Kernel.early``)."""
    return card(index)[0] >= plan.HOPPER


def kernel_of(index: int, build: plan.Build, grid: tuple[int, int, int], shared: int) -> Kernel:
    """Load a build on the current device, compiling it if need be."""
    function = library.function(index, card(index)[0], build)
    return Kernel(driver.launcher().launch, function, grid, build.threads, shared)


def kernel_in_turns(index: int, build: plan.InTurns, m: int, n: int) -> tuple[int, Kernel]:
    """A build whose clusters take an (m, n) output's tiles in turn: how many are not halved, and the kernel."""
    turns = build.turns(m, n, card(index)[1])
    grid = turns.clusters * build.cluster, 1, 1
    return turns.whole, kernel_of(index, build, grid, build.shared_bytes())


def pointer(tensor: torch.Tensor | None) -> int:
    """Where an operand is; 0 for one that a layer does not have."""
    return 0 if tensor is None else tensor.data_ptr()


@lru_cache(maxsize=4096)
def gemm_kernel(index: int, m: int, n: int, bf16: bool, unsigned: bool, epilogue: int) -> Kernel:
    """The plan's kernel for an (m, n) output, by ``plan.gemm_build``'s names."""
    build = plan.gemm_build(*card(index), m, n, bf16, unsigned, epilogue)
    return kernel_of(index, build, build.grid(m, n), build.shared_bytes())


@lru_cache(maxsize=4096)
def quantize_kernel(
    index: int, m: int, k: int, rank: int, bf16: bool, unsigned: bool, prologue: int, output: int
) -> tuple[Kernel, plan.QuantizeLaunch]:
    """The plan's quantizer, by ``plan.quantize_launch``'s names, and how it deals out rows."""
    launch = plan.quantize_launch(*card(index), m, k, rank, bf16, unsigned, prologue, output)
    kernel = kernel_of(index, launch.build, launch.grid, launch.build.shared_bytes(launch.warps))
    return kernel._replace(threads=launch.warps * 32, early=starts_early(index)), launch


_NOTHING = nullcontext()


def on(index: int):
    """Makes a device current; costs nothing where there is one only."""
    return _NOTHING if _device_count() == 1 else torch.cuda.device(index)


def expect(operator: str, name: str, tensor: torch.Tensor, like: torch.Tensor, shape: tuple, dtype: torch.dtype):
    """Raise if an operand's device, dtype, shape or layout is not what the kernels read."""
    if (
        tensor.dtype == dtype
        and tensor.shape == shape
        and tensor.get_device() == like.get_device()
        and tensor.is_contiguous()
        and not tensor.data_ptr() & 15
    ):
        return
    if tensor.device != like.device:
        raise KernelInputError(f"svdq::{operator}: {name} is on {tensor.device}, the activations on {like.device}")
    if tensor.dtype != dtype:
        raise KernelInputError(f"svdq::{operator}: {name} is {tensor.dtype}, expected {dtype}")
    if tuple(tensor.shape) != shape:
        raise KernelInputError(f"svdq::{operator}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_contiguous():
        raise KernelInputError(f"svdq::{operator}: {name} has strides {tensor.stride()}; make it contiguous")
    if tensor.data_ptr() % 16:
        raise KernelInputError(f"svdq::{operator}: {name} does not start on a 16-byte boundary; clone it")


def whole(tensor: torch.Tensor, like: torch.Tensor | None = None) -> bool:
    """Whether a tensor is contiguous and aligned; and of the same type and device as another."""
    if like is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
        return False
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def evenly_spaced(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether tokens (B, L, C) of all images are equally far apart, each whole and aligned; of that type and device."""
    return (
        tensor.dtype == like.dtype
        and tensor.device == like.device
        and tensor.stride(2) == 1
        and tensor.stride(1) % 8 == 0
        and (tensor.shape[0] == 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1))
        and tensor.data_ptr() % 16 == 0
    )


def _check_width(operator: str, k: int) -> None:
    if k == 0 or k % plan.GROUP:
        raise KernelInputError(f"svdq::{operator}: K = {k} is not a positive multiple of {plan.GROUP}")


def check_limits(operator: str, m: int, n: int, k: int) -> None:
    if max(m * n, m * k, n * k) >= 2**31:
        raise KernelInputError(f"svdq::{operator}: {m} x {k} x {n} is beyond 2^31 elements; split the rows")


def pad_rank(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels read 8 ranks at a time; other ranks cost a copy (layers keep theirs a multiple)."""
    extra = -tensor.shape[1] % _RANK_STEP
    return torch.nn.functional.pad(tensor, (0, extra)) if extra else tensor


def down_width(rank: int) -> int:
    """Columns of a ``down`` in 16 bits: zeros behind the rank make them a multiple of 64."""
    return -(-rank // _DOWN_STEP) * _DOWN_STEP


_counters: dict[tuple[int, int, bool], tuple[int, torch.Tensor]] = {}


def zero_counters(index: int, stream: int, count: int) -> torch.Tensor:
    """Counters that are zero between launches; one set a stream, since launches of a stream don't overlap.

    A graph has its own, which it zeroes once, not for every launch: they are kept while its capture lasts.
    """
    capture = driver.capture_id(stream) if torch.cuda.is_current_stream_capturing() else 0
    key = index, stream, capture != 0
    found = _counters.get(key)
    if found is None or found[0] != capture or found[1].numel() < count:
        found = capture, torch.zeros(max(count, 4096), dtype=torch.int32, device=torch.device("cuda", index))
        _counters[key] = found
    return found[1]


class QuantizerOutputs(NamedTuple):
    """Where the quantizer writes, in the form of ``output`` (``csrc/quantize_int4.cu``)."""

    output: int
    padded_rows: int
    qact: torch.Tensor
    act_scale: torch.Tensor
    down: torch.Tensor
    chunk_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raise unless ``x`` is (M, K) as the kernels of ``svdq::name`` take it.

    Raises:
        KernelInputError: it is not.
    """
    if x.dim() != 2 or x.dtype not in SIXTEEN_BIT:
        raise KernelInputError(f"svdq::{name}: x is {tuple(x.shape)} {x.dtype}, expected (M, K) bfloat16 or float16")
    m, k = x.shape
    _check_width(name, k)
    check_limits(name, m, 1, k)
    expect(name, "x", x, x, (m, k), x.dtype)


def check_quantizer_input(name: str, x: torch.Tensor, smooth_factor: torch.Tensor, proj_down: torch.Tensor) -> None:
    """Raise unless the quantizer takes these operands of ``svdq::name``.

    Raises:
        KernelInputError: it does not.
    """
    check_rows(name, x)
    _check_quantizer_layer(name, x, x.shape[1], smooth_factor, proj_down)


def _check_quantizer_layer(name: str, x: torch.Tensor, k: int, smooth_factor, proj_down) -> None:
    if proj_down.dim() != 2:
        raise KernelInputError(f"svdq::{name}: proj_down has shape {tuple(proj_down.shape)}, expected (K, rank)")
    expect(name, "smooth_factor", smooth_factor, x, (k,), x.dtype)
    expect(name, "proj_down", proj_down, x, (k, proj_down.shape[1]), x.dtype)


def check_int4_layer(
    name: str,
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Raise unless the kernels of a whole INT4 layer, ``svdq::name``, take these operands.

    Raises:
        KernelInputError: they do not.
    """
    check_quantizer_input(name, x, smooth_factor, proj_down)
    (m, k), n, dtype = x.shape, weight.shape[0], x.dtype
    check_limits(name, m, n, k)
    if n == 0 or n % 8:
        raise KernelInputError(f"svdq::{name}: N = {n} is not a positive multiple of 8")
    expect(name, "weight", weight, x, (n, k // 2), torch.int8)
    expect(name, "weight_scale", weight_scale, x, (k // plan.GROUP, n), dtype)
    expect(name, "proj_up", proj_up, x, (n, proj_down.shape[1]), dtype)
    if bias is not None:
        expect(name, "bias", bias, x, (n,), dtype)


def _check_gelu_input(name: str, x: torch.Tensor, y: torch.Tensor, smooth_factor, proj_down) -> None:
    if y.dim() != 2 or y.dtype not in SIXTEEN_BIT:
        raise KernelInputError(f"svdq::{name}: y is {tuple(y.shape)} {y.dtype}, expected (M, C) bfloat16 or float16")
    (m, columns), before = y.shape, x.shape[-1]
    _check_width(name, columns)
    if before % plan.GROUP:
        raise KernelInputError(f"svdq::{name}: x has {before} columns, expected a multiple of {plan.GROUP}")
    check_limits(name, m, 1, before + columns)
    check_limits(name, m, 1, y.stride(0))
    expect(name, "x", x, y, (m, before), y.dtype)
    if m and (y.stride(1) != 1 or y.stride(0) % 8 or y.data_ptr() % 16):
        raise KernelInputError(f"svdq::{name}: y has strides {y.stride()}; each row has to be aligned and in one piece")
    _check_quantizer_layer(name, y, before + columns, smooth_factor, proj_down)


def launch_quantizer(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    act_unsigned: bool,
    out: QuantizerOutputs,
    prologue: int = plan.PLAIN,
    modulation: tuple[torch.Tensor, torch.Tensor] | None = None,
    y: torch.Tensor | None = None,
) -> None:
    """Start the quantizer on checked operands; ``x`` has rows, ``proj_down`` a multiple of 8 ranks."""
    (k, rank), m, index = proj_down.shape, x.shape[0], x.device.index
    scale_pointer = shift_pointer = y_pointer = x_groups = y_stride = 0
    modulation_rows = 1
    if y is not None:
        y_pointer, x_groups, y_stride = y.data_ptr(), x.shape[1] // plan.GROUP, y.stride(0)
    if modulation is not None:
        scale_pointer, shift_pointer = (tensor.data_ptr() for tensor in modulation)
        modulation_rows = m // modulation[0].shape[0]
    with on(index):
        kernel, shape = quantize_kernel(
            index, m, k, rank, x.dtype == torch.bfloat16, bool(act_unsigned), prologue, out.output
        )
        kernel.launch(
            torch._C._cuda_getCurrentRawStream(index),
            QUANTIZE.pack(
                x.data_ptr(),
                smooth_factor.data_ptr(),
                proj_down.data_ptr(),
                out.qact.data_ptr(),
                out.act_scale.data_ptr(),
                out.down.data_ptr(),
                m,
                k,
                rank,
                shape.eights,
                shape.longer,
                shape.own_groups,
                scale_pointer,
                shift_pointer,
                modulation_rows,
                out.padded_rows,
                0 if out.chunk_scale is None else out.chunk_scale.data_ptr(),
                0 if out.down_scale is None else out.down_scale.data_ptr(),
                y_pointer,
                x_groups,
                y_stride,
            ),
        )


def quantize(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    act_unsigned: bool,
    prologue: int = plan.PLAIN,
    modulation: tuple[torch.Tensor, torch.Tensor] | None = None,
    y: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``svdq::quantize_act_int4``, with GELU or a modulation in front, or with a rotation.

    Args:
        modulation: (scale, shift), each (B, K); rows ``i * M / B`` on take row ``i``.
        y: with a GELU: (M, C), of which it is taken, behind the columns of x.

    Returns:
        qact, act_scale, down.

    Raises:
        KernelInputError: an operand that the kernel does not take.
    """
    name = "quantize_act_int4"
    if y is None:
        check_quantizer_input(name, x, smooth_factor, proj_down)
    else:
        _check_gelu_input(name, x, y, smooth_factor, proj_down)
    (k, rank), m = proj_down.shape, x.shape[0]
    if modulation is not None:
        batch = modulation[0].shape[0]
        if batch == 0 or m % batch:
            raise KernelInputError(f"svdq::{name}: {m} rows do not divide into {batch} modulations")
        for label, tensor in zip(("scale", "shift"), modulation, strict=True):
            expect(name, label, tensor, x, (batch, k), x.dtype)
    proj_down = pad_rank(proj_down)
    padded = proj_down.shape[1]
    out = QuantizerOutputs(
        plan.NIBBLES,
        m,
        torch.empty((m, k // 2), dtype=torch.int8, device=x.device),
        torch.empty((k // plan.GROUP, m), dtype=torch.float32, device=x.device),
        torch.empty((m, padded), dtype=torch.float32, device=x.device),
    )
    if m:
        launch_quantizer(x, smooth_factor, proj_down, act_unsigned, out, prologue, modulation, y)
    return out.qact, out.act_scale, out.down if padded == rank else out.down[:, :rank].contiguous()


def gemm(
    qact: torch.Tensor,
    act_scale: torch.Tensor,
    down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    act_unsigned: bool,
    *,
    next_layer: tuple[torch.Tensor, torch.Tensor] | None = None,
    norm: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, float] | None = None,
    build: plan.GemmBuild | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``svdq::linear_int4``, and the same with an epilogue.

    Args:
        next_layer: (smooth_factor, proj_down) of the layer that takes GELU(y): return its qact, act_scale
            and down instead of y.
        norm: (q weight, k weight, rope (R, 64, 2, 2), heads, epsilon): normalize and rotate the heads of q and k.
        build: run this one instead of the plan's, to tune or to time.

    Raises:
        KernelInputError: an operand that the kernel does not take.
    """
    name = "linear_int4"
    dtype = proj_up.dtype
    if dtype not in SIXTEEN_BIT:
        raise KernelInputError(f"svdq::{name}: proj_up is {dtype}, expected bfloat16 or float16")
    if qact.dim() != 2 or weight.dim() != 2 or down.dim() != 2:
        raise KernelInputError(f"svdq::{name}: qact, weight and down must have two dimensions")
    m, half_k = qact.shape
    n, k, rank = weight.shape[0], 2 * half_k, down.shape[1]
    _check_width(name, k)
    check_limits(name, m, n, k)
    if n == 0 or n % 8:
        raise KernelInputError(f"svdq::{name}: N = {n} is not a positive multiple of 8")
    groups = k // plan.GROUP
    expect(name, "qact", qact, qact, (m, half_k), torch.int8)
    expect(name, "act_scale", act_scale, qact, (groups, m), torch.float32)
    expect(name, "down", down, qact, (m, rank), torch.float32)
    expect(name, "weight", weight, qact, (n, half_k), torch.int8)
    expect(name, "weight_scale", weight_scale, qact, (groups, n), dtype)
    expect(name, "proj_up", proj_up, qact, (n, rank), dtype)
    if bias is not None:
        expect(name, "bias", bias, qact, (n,), dtype)
    down, proj_up = pad_rank(down), pad_rank(proj_up)

    device = qact.device
    epilogue = plan.STORE
    pointers = [0, 0, 0, 0, 0]  # of the next layer
    next_rank = norm_columns = rope_rows = 0
    norm_pointers = [0, 0, 0]
    epsilon = 0.0
    if next_layer is not None:
        epilogue = plan.GELU_QUANTIZE
        smooth, proj_down = next_layer
        if n % plan.GROUP:
            raise KernelInputError(f"svdq::{name}: N = {n} is not a multiple of {plan.GROUP}, as the next layer needs")
        true_rank = proj_down.shape[1]
        expect(name, "next_smooth_factor", smooth, qact, (n,), dtype)
        expect(name, "next_proj_down", proj_down, qact, (n, true_rank), dtype)
        proj_down = pad_rank(proj_down)
        next_rank = proj_down.shape[1]
        out = (
            torch.empty((m, n // 2), dtype=torch.int8, device=device),
            torch.empty((n // plan.GROUP, m), dtype=torch.float32, device=device),
            torch.zeros((m, next_rank), dtype=torch.float32, device=device),
        )
        pointers = [smooth.data_ptr(), proj_down.data_ptr(), *(tensor.data_ptr() for tensor in out)]
    else:
        out = torch.empty((m, n), dtype=dtype, device=device)
    if norm is not None:
        epilogue = plan.NORM_ROPE
        norm_q, norm_k, rope, heads, epsilon = norm
        norm_columns, rope_rows = heads * 128, rope.shape[0]
        if heads < 1 or n < 3 * norm_columns:
            raise KernelInputError(f"svdq::{name}: N = {n} has no room for q, k and v of {heads} heads of 128 columns")
        if not rope_rows or m % rope_rows:
            raise KernelInputError(f"svdq::{name}: {m} rows are not several times the {rope_rows} of rope")
        expect(name, "norm_q", norm_q, qact, (128,), dtype)
        expect(name, "norm_k", norm_k, qact, (128,), dtype)
        expect(name, "rope", rope, qact, (rope_rows, 64, 2, 2), torch.float32)
        norm_pointers = [norm_q.data_ptr(), norm_k.data_ptr(), rope.data_ptr()]
    if m:
        arguments = GEMM.pack(
            qact.data_ptr(),
            act_scale.data_ptr(),
            down.data_ptr(),
            weight.data_ptr(),
            weight_scale.data_ptr(),
            proj_up.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr() if next_layer is None else 0,
            m,
            n,
            k,
            down.shape[1],
            *pointers,
            next_rank,
            norm_columns,
            *norm_pointers,
            epsilon,
            rope_rows,
        )
        index = device.index
        with on(index):
            if build is None:
                kernel = gemm_kernel(index, m, n, dtype == torch.bfloat16, bool(act_unsigned), epilogue)
            else:
                kernel = kernel_of(index, build, build.grid(m, n), build.shared_bytes())
            kernel.launch(torch._C._cuda_getCurrentRawStream(index), arguments)
    if next_layer is not None and next_rank != true_rank:
        return out[0], out[1], out[2][:, :true_rank].contiguous()
    return out
