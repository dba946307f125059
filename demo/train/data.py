"""The training pictures: Noto Emoji drawings as 128-pixel RGBA arrays with their names.

    python demo/train/data.py emoji.npz

downloads the npm package `@iconify-json/noto` (Apache-2.0; needs `npm` on the path), renders the chosen drawings
with `resvg_py`, and writes `rgba` (N, 128, 128, 4) uint8, `names` (N,) and `mirror` (N,) bool, the
last saying whether the mirrored drawing still deserves the name.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np

PACKAGE = "@iconify-json/noto@1.2.9"
SIZE = 128

WHOLE_CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Smileys & Emotion",
    "Travel & Places",
)
MIRRORED_CATEGORIES = ("Animals & Nature", "Food & Drink")

# Variants that differ too little to tell apart at this size, and drawings that are mostly lettering.
SKIPPED = re.compile(
    r"oclock|-thirty$|mailbox|envelope|e-mail|banknote|chart-|card-|notebook|notepad|ledger|calendar|japanese-"
    r"|page-|tray$|-with-pen|-with-key|muted|low-volume|medium-volume|button|-sign$|bookmark-tabs|face-without-mouth"
    r"|convenience|department|love-hotel|post-office|map-of-japan|lips-|microbe|-quarter-moon$|-gibbous-moon$"
)
PEOPLE = [
    "anatomical-heart",
    "astronaut",
    "artist",
    "baby",
    "baby-angel",
    "bone",
    "boy",
    "brain",
    "ballet-dancer",
    "call-me-hand",
    "child",
    "clapping-hands",
    "construction-worker",
    "cook",
    "crossed-fingers",
    "detective",
    "ear",
    "elf",
    "eye",
    "eyes",
    "factory-worker",
    "fairy",
    "farmer",
    "fingerprint",
    "firefighter",
    "flexed-biceps",
    "folded-hands",
    "footprints",
    "genie",
    "girl",
    "guard",
    "handshake",
    "heart-hands",
    "judge",
    "lungs",
    "mage",
    "man",
    "mechanic",
    "mermaid",
    "merman",
    "mouth",
    "ninja",
    "nose",
    "ok-hand",
    "old-man",
    "old-woman",
    "oncoming-fist",
    "pilot",
    "police-officer",
    "prince",
    "princess",
    "raised-fist",
    "raised-hand",
    "santa-claus",
    "scientist",
    "sign-of-the-horns",
    "singer",
    "student",
    "superhero",
    "supervillain",
    "thumbs-down",
    "thumbs-up",
    "tooth",
    "tongue",
    "troll",
    "vampire",
    "victory-hand",
    "vulcan-salute",
    "waving-hand",
    "woman",
    "writing-hand",
    "zombie",
]
SYMBOLS = [
    "biohazard",
    "black-circle",
    "blue-circle",
    "blue-square",
    "brown-circle",
    "brown-square",
    "check-mark-button",
    "cross-mark",
    "green-circle",
    "green-square",
    "infinity",
    "large-blue-diamond",
    "large-orange-diamond",
    "no-entry",
    "orange-circle",
    "orange-square",
    "peace-symbol",
    "prohibited",
    "purple-circle",
    "purple-square",
    "radioactive",
    "recycling-symbol",
    "red-circle",
    "red-exclamation-mark",
    "red-question-mark",
    "red-square",
    "warning",
    "yellow-circle",
    "yellow-square",
    "yin-yang",
]


def download(folder: Path) -> tuple[dict[str, str], dict[str, list[str]]]:
    """SVG bodies by name, and names by category, of the npm package."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, text=True
    )
    with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
        icons = json.load(archive.extractfile("package/icons.json"))["icons"]
        metadata = json.load(archive.extractfile("package/metadata.json"))
    return {name: icon["body"] for name, icon in icons.items()}, metadata["categories"]


def choose(categories: dict[str, list[str]]) -> list[str]:
    """Names of the drawings to learn, sorted."""
    names = [name for category in WHOLE_CATEGORIES for name in categories[category]]
    return sorted({name for name in names if not SKIPPED.search(name)} | {*PEOPLE, *SYMBOLS})


def render(body: str) -> np.ndarray:
    """One drawing as (SIZE, SIZE, 4) uint8, straight alpha."""
    import resvg_py
    from PIL import Image

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        bodies, categories = download(Path(folder))
    names = choose(categories)
    mirrored = {name for category in MIRRORED_CATEGORIES for name in categories[category]}
    np.savez_compressed(
        output,
        rgba=np.stack([render(bodies[name]) for name in names]),
        names=np.array([name.replace("-", " ") for name in names]),
        mirror=np.array([name in mirrored for name in names]),
    )
    print(f"{len(names)} drawings -> {output}")


if __name__ == "__main__":
    main()
