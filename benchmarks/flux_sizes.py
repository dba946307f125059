"""How large FLUX.1's quantized layers are: arithmetic over their true shapes, no weights needed.

python -m benchmarks.flux_sizes
"""

import json
from pathlib import Path

import torch

from svdq_core.architectures import ARCHITECTURES
from svdq_core.formats.comfy_quant import SVDQUANT_W4A4, LayerSpec

RESULTS = Path(__file__).parent / "results"
HIDDEN, DOUBLE_BLOCKS, SINGLE_BLOCKS, PARAMETERS = 3072, 19, 38, 11_901_408_320  # FLUX.1-dev


def layer_shapes(hidden: int, double_blocks: int, single_blocks: int) -> dict[str, tuple[int, int]]:
    """(N, K) of the quantized layers of a FLUX.1."""
    parts = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4)}
    shapes = {}
    for block in range(double_blocks):
        for stream in ("img", "txt"):
            for part, (n, k) in parts.items():
                shapes[f"double_blocks.{block}.{stream}_{part}"] = (n * hidden, k * hidden)
    for block in range(single_blocks):
        shapes[f"single_blocks.{block}.linear1"] = (7 * hidden, hidden)
        shapes[f"single_blocks.{block}.linear2"] = (hidden, 5 * hidden)
    return shapes


def sizes(hidden: int, double_blocks: int, single_blocks: int, rank: int) -> dict[str, float]:
    """Bytes of the quantized layers in 16 bits and in the file's format."""
    flux = next(architecture for architecture in ARCHITECTURES if architecture.name == "flux")
    layers = [
        LayerSpec(name, SVDQUANT_W4A4, n, k, rank, True, torch.bfloat16, flux.input_after_gelu(name))
        for name, (n, k) in layer_shapes(hidden, double_blocks, single_blocks).items()
    ]
    full, quantized = sum(layer.nbytes_16bit for layer in layers), sum(layer.nbytes for layer in layers)
    return {"bytes_16bit": full, "bytes_4bit": quantized, "size_ratio": round(full / quantized, 3)}


def main() -> None:
    """Write the JSON."""
    flux = {f"rank {rank}": sizes(HIDDEN, DOUBLE_BLOCKS, SINGLE_BLOCKS, rank) for rank in (0, 16, 32, 64, 128)}
    for entry in flux.values():
        entry["file_bytes"] = 2 * PARAMETERS - entry["bytes_16bit"] + entry["bytes_4bit"]
    result = {
        "command": "python -m benchmarks.flux_sizes",
        "FLUX.1-dev": {"parameters": PARAMETERS, "bytes_16bit": 2 * PARAMETERS} | flux,
        "rank 32 by hidden size": {
            str(h): sizes(h, 1, 6, 32)["size_ratio"] for h in (256, 512, 1024, 1536, 2048, 3072)
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "flux_sizes.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
