"""How large FLUX.1's quantized layers are: arithmetic over their true shapes, no weights needed.

python -m benchmarks.flux_sizes
"""

import json
from pathlib import Path

import torch

from svdq_core.architectures import ARCHITECTURES
from svdq_core.formats.comfy_quant import LayerSpec
from svdq_core.quantizer.pipeline import DEFAULT_RANK, MODULATIONS, PRECISIONS, Settings

RESULTS = Path(__file__).parent / "results"
FLUX = next(architecture for architecture in ARCHITECTURES if architecture.name == "flux")
HIDDEN, DOUBLE_BLOCKS, SINGLE_BLOCKS, PARAMETERS = 3072, 19, 38, 11_901_408_320  # FLUX.1-dev


def layer_shapes(hidden: int, double_blocks: int, single_blocks: int) -> dict[str, tuple[int, int]]:
    """(N, K) of the linear layers in the blocks of a FLUX.1."""
    parts = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (4, 1), "mlp.2": (1, 4), "mod.lin": (6, 1)}
    shapes = {}
    for block in range(double_blocks):
        for stream in ("img", "txt"):
            for part, (n, k) in parts.items():
                shapes[f"double_blocks.{block}.{stream}_{part}"] = (n * hidden, k * hidden)
    for block in range(single_blocks):
        shapes[f"single_blocks.{block}.linear1"] = (7 * hidden, hidden)
        shapes[f"single_blocks.{block}.linear2"] = (hidden, 5 * hidden)
        shapes[f"single_blocks.{block}.modulation.lin"] = (3 * hidden, hidden)
    return shapes


def sizes(shapes: dict[str, tuple[int, int]], settings: Settings) -> dict[str, float]:
    """Bytes of the layers that the settings quantize, in 16 bits and in the file's formats."""
    full = quantized = 0
    for name, (n, k) in shapes.items():
        format_name = settings.format_of(FLUX, name)
        if format_name is None:
            continue
        rank = settings.rank_of(FLUX, name)
        layer = LayerSpec(name, format_name, n, k, rank, bias=True, dtype=torch.bfloat16)
        full += layer.nbytes_16bit
        quantized += layer.nbytes
    return {"bytes_16bit": full, "bytes_quantized": quantized, "size_ratio": round(full / quantized, 3)}


def flux_dev(settings: Settings) -> dict[str, float]:
    """:func:`sizes` of FLUX.1-dev, and of its whole file."""
    entry = sizes(layer_shapes(HIDDEN, DOUBLE_BLOCKS, SINGLE_BLOCKS), settings)
    return entry | {"file_bytes": 2 * PARAMETERS - entry["bytes_16bit"] + entry["bytes_quantized"]}


def main() -> None:
    """Write the JSON."""
    result = {
        "command": "python -m benchmarks.flux_sizes",
        "FLUX.1-dev": {
            "parameters": PARAMETERS,
            "bytes_16bit": 2 * PARAMETERS,
            f"precisions at rank {DEFAULT_RANK}": {
                f"{precision}, modulations {modulations}": flux_dev(Settings(precision, modulations=modulations))
                for precision in PRECISIONS
                for modulations in MODULATIONS
            },
            "int4, modulations 16bit, by rank": {
                rank: flux_dev(Settings(rank=rank, modulations="16bit")) for rank in (0, 16, 32, 64, 128)
            },
        },
        "int4, modulations 16bit, size ratio at rank 32 by hidden size": {
            hidden: sizes(layer_shapes(hidden, 1, 6), Settings(modulations="16bit"))["size_ratio"]
            for hidden in (256, 512, 1024, 1536, 2048, 3072)
        },
    }
    (RESULTS / "flux_sizes.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
