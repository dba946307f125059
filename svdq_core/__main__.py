"""The command line: ``python -m svdq_core quantize | calibration | inspect | doctor | bench``."""

import argparse
import logging
import sys

import torch
from tqdm import tqdm

from . import bench
from .doctor import diagnose
from .errors import SVDQuantError
from .quantizer.pipeline import (
    AUTO,
    DEFAULT_RANK,
    MODULATIONS,
    PRECISIONS,
    FileSource,
    Settings,
    quantize_checkpoint,
)
from .quantizer.recipes import RECIPES
from .quantizer.statistics import Calibration
from .summary import summarize_file


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code (2 for bad input, with one line that says what)."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    try:
        options.command(options)
    except SVDQuantError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m svdq_core", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    quantize = commands.add_parser("quantize", help="make a 4-bit (or 8-bit) checkpoint of a 16-bit one")
    quantize.add_argument("source", help="16-bit .safetensors checkpoint, ComfyUI's key names")
    quantize.add_argument("output", help="the file to write")
    quantize.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="int4",
        help="int4, nvfp4: weights and activations in 4 bits; int8: both in 8; nf4: weights only (default: int4)",
    )
    quantize.add_argument(
        "--modulations",
        choices=(AUTO, *MODULATIONS),
        default=AUTO,
        help="of the modulation layers: 4-bit weights, 8-bit, or as they are (default: int8 for int8, else awq_w4a16)",
    )
    quantize.add_argument(
        "--recipe",
        choices=RECIPES,
        help="default: balanced with --calibration, fast (which needs none) without",
    )
    quantize.add_argument("--rank", type=int, default=DEFAULT_RANK, help="of the low-rank branch")
    quantize.add_argument(
        "--skip", nargs="*", default=(), metavar="LAYER", help="layers to leave in 16 bits (* allowed)"
    )
    quantize.add_argument("--seed", type=int, default=0)
    quantize.add_argument("--calibration", help="file saved by SVDQuant Calibrate or SVDQuant Quantize Checkpoint")
    quantize.add_argument(
        "--max-error",
        type=float,
        default=Settings.max_error,
        metavar="ERROR",
        help="a layer whose relative error is larger is kept in 8 or 16 bits (default: %(default)s)",
    )
    quantize.add_argument(
        "--keep-broken", action="store_true", help="leave layers with NaN or infinite weights as they are"
    )
    quantize.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    quantize.add_argument("--overwrite", action="store_true", help="replace an existing file")
    quantize.add_argument(
        "--restart", action="store_true", help="begin again instead of going on with what an interrupted run left"
    )
    quantize.set_defaults(command=_quantize)

    calibration = commands.add_parser("calibration", help="work on calibration files")
    actions = calibration.add_subparsers(required=True, metavar="action")
    merge = actions.add_parser("merge", help="one calibration of several of the same model")
    merge.add_argument("files", nargs="+", metavar="file")
    merge.add_argument("-o", "--output", required=True, help="the file to write")
    merge.add_argument("--overwrite", action="store_true")
    merge.set_defaults(command=_merge)

    inspect = commands.add_parser("inspect", help="what a checkpoint holds, per layer")
    inspect.add_argument("file")
    inspect.set_defaults(command=lambda options: print(summarize_file(options.file).text()))

    doctor = commands.add_parser("doctor", help="which backend runs here, and why")
    doctor.set_defaults(command=lambda options: print(diagnose()))

    timing = commands.add_parser("bench", help="time the kernels of this card against 16 bits and peers")
    bench.add_arguments(timing)
    timing.set_defaults(command=bench.run)
    return parser


def _quantize(options: argparse.Namespace) -> None:
    calibration = Calibration.load(options.calibration) if options.calibration else None
    recipe = options.recipe or ("balanced" if calibration else "fast")
    settings = Settings(
        options.precision,
        recipe,
        options.rank,
        tuple(options.skip),
        options.seed,
        options.modulations,
        options.max_error,
        options.keep_broken,
    )
    source = FileSource(options.source)
    with tqdm(unit="tensor") as bar:

        def progress(done: int, total: int, text: str) -> None:
            bar.total = total
            bar.set_postfix_str(text, refresh=False)
            bar.update(done - bar.n)

        report = quantize_checkpoint(
            source,
            options.output,
            settings,
            calibration,
            progress,
            options.overwrite,
            options.device,
            restart=options.restart,
        )
    print(report.text())


def _merge(options: argparse.Namespace) -> None:
    merged = Calibration.load(options.files[0])
    for file in options.files[1:]:
        merged.merge(Calibration.load(file))
    merged.save(options.output, options.overwrite)
    print(f"{options.output}: {len(merged.layers)} layers, {sum(layer.count for layer in merged.layers.values())} rows")


if __name__ == "__main__":
    sys.exit(main())
