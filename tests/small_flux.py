"""A FLUX of two small blocks with random weights, as a state dict: the core's test model."""

import torch

HIDDEN = 128


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


def state_dict(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights with a few strong directions and outlier channels, as trained ones have."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    tensors = {"img_in.weight": normal(HIDDEN, 64), "img_in.bias": normal(HIDDEN)}
    for name, (n, k) in layer_shapes().items():
        weight = normal(n, k) + 2 * normal(n, 4) @ normal(4, k)
        tensors[f"{name}.weight"] = weight * k**-0.5
        tensors[f"{name}.bias"] = 0.1 * normal(n)
    tensors["double_blocks.0.img_attn.norm.key_norm.scale"] = 1 + 0.1 * normal(128)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def quantized_layers() -> list[str]:
    """Names of the layers that are quantized: all but the modulations."""
    return [name for name in layer_shapes() if "mod" not in name]


def inputs(layer: str, rows: int = 256, seed: int = 1) -> torch.Tensor:
    """(rows, K); after a GELU where the model has one, elsewhere with outlier channels."""
    k = layer_shapes()[layer][1]
    x = torch.randn((rows, k), generator=torch.Generator().manual_seed(seed))
    if layer.endswith("mlp.2"):
        return torch.nn.functional.gelu(x, approximate="tanh")
    x[:, :: k // 4] *= 20
    return x
