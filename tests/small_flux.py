"""A FLUX of one double and one single block with random weights, complete for the host."""

import torch

HIDDEN = 128
CONTEXT = 512


def layer_shapes() -> dict[str, tuple[int, int]]:
    """(N, K) of every linear layer of the blocks."""
    h = HIDDEN
    shapes = {}
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}_"
        shapes[block + "attn.qkv"] = (3 * h, h)
        shapes[block + "attn.proj"] = (h, h)
        shapes[block + "mlp.0"] = (4 * h, h)
        shapes[block + "mlp.2"] = (h, 4 * h)
        shapes[block + "mod.lin"] = (6 * h, h)
    shapes["single_blocks.0.linear1"] = (7 * h, h)
    shapes["single_blocks.0.linear2"] = (h, 5 * h)
    shapes["single_blocks.0.modulation.lin"] = (3 * h, h)
    return shapes


def quantized_layers() -> list[str]:
    """Names of the layers that are quantized."""
    return [*body_layers(), *modulations()]


def body_layers() -> list[str]:
    """Names of the layers that every token goes through."""
    return [name for name in layer_shapes() if "mod" not in name]


def modulations() -> list[str]:
    """Names of the modulation layers."""
    return [name for name in layer_shapes() if "mod" in name]


def state_dict(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under FLUX's own names; the blocks' have a few strong directions, as trained ones do."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    h = HIDDEN
    ends = {
        "img_in": (h, 64),
        "txt_in": (h, CONTEXT),
        "time_in.in_layer": (h, 256),
        "time_in.out_layer": (h, h),
        "vector_in.in_layer": (h, 768),
        "vector_in.out_layer": (h, h),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    tensors = {}
    for name, (n, k) in (ends | layer_shapes()).items():
        weight = normal(n, k)
        if name in body_layers():
            weight += normal(n, 4) @ normal(4, k)
        tensors[f"{name}.weight"] = weight * k**-0.5
        tensors[f"{name}.bias"] = 0.05 * normal(n)
    for norm in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        for part in ("query_norm", "key_norm"):
            tensors[f"{norm}.norm.{part}.scale"] = 1 + 0.1 * normal(128)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def inputs(layer: str, rows: int = 256, seed: int = 1) -> torch.Tensor:
    """(rows, K); after a GELU where the model has one, elsewhere with outlier channels."""
    k = layer_shapes()[layer][1]
    x = torch.randn((rows, k), generator=torch.Generator().manual_seed(seed))
    if layer.endswith("mlp.2"):
        return torch.nn.functional.gelu(x, approximate="tanh")
    x[:, :: k // 4] *= 20
    return x
