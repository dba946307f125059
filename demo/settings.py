"""What the demo and the benchmarks draw, and how: the demo model's own settings."""

from pathlib import Path

DEMO = Path(__file__).parent
ASSETS = DEMO / "assets"
MODEL = ASSETS / "svdquant_demo_flux.safetensors"
VAE = "taef1"

SIZE = 128  # pixels; the latent has an eighth
SAMPLING = {"steps": 20, "cfg": 2.5, "sampler_name": "euler", "scheduler": "simple"}
CALIBRATION = SAMPLING | {"steps": 8}

PROMPTS = (DEMO / "prompts.txt").read_text(encoding="utf-8").splitlines()

# None of them is among PROMPTS: quality is judged on what calibration did not see.
CALIBRATION_PROMPTS = (
    "green apple",
    "banana on a green background",
    "popcorn",
    "dog face on a blue background",
    "honeybee",
    "spouting whale on a pink background",
    "four leaf clover",
    "grinning face",
    "angry face on a black background",
    "locomotive",
    "house with garden on a yellow background",
    "volcano",
    "umbrella on a purple background",
    "basketball",
    "violin on a red background",
    "hammer",
)
