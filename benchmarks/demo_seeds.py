"""How much an image's quality depends on the quantizer's own chance: recipes on the demo model with several seeds.

    python -m benchmarks.demo_seeds

Everything is as in ``benchmarks.demo_quality``, of which this draws half of the prompts; the seed decides a rotation's
signs and where randomized decompositions begin. Writes ``benchmarks/results/demo_seeds.json``. Runs on the CPU.
"""

import json
import platform
import statistics
import time

import torch

from benchmarks.demo_quality import RESULTS, Trial
from benchmarks.methods import METHODS, PAPER

SEEDS, DRAWN = 4, 32
TRIED = (PAPER, "ours, fast", "ours, balanced", "ours, best")


def main() -> None:
    """Run everything and write the JSON."""
    start = time.monotonic()
    trial = Trial(DRAWN)
    methods = {}
    for name in TRIED:
        found = [trial.measure(f"{name}, seed {seed}", METHODS[name], seed=seed)["psnr_db"] for seed in range(SEEDS)]
        mean, deviation = statistics.mean(found), statistics.stdev(found)
        methods[name] = {"psnr_db": found, "mean": round(mean, 3), "standard_deviation": round(deviation, 3)}
    result = {
        "command": "python -m benchmarks.demo_seeds",
        "prompts": DRAWN,
        "seeds": SEEDS,
        "torch": torch.__version__,
        "host": trial.host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(time.monotonic() - start),
        "methods": methods,
    }
    (RESULTS / "demo_seeds.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
