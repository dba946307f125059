"""The pictures of docs/ and example_workflows/: `python -m tools.pictures`, after a change of the nodes.

A real server and a real browser: each node is photographed after it ran on the demo model, and each example's thumbnail
is what it drew with the demo model; for those the demo model cannot stand in (SDXL, PixArt), the graph itself.
"""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

from demo.examples import EXAMPLES, QUANTIZED, make_models, with_demo_model
from demo.settings import ASSETS, DEMO, MODEL, SAMPLING, SIZE
from tools.browser import SETTINGS, Canvas, chromium
from tools.comfy_host import ComfyHost, Graph

ROOT = DEMO.parent
DOCS = ROOT / "docs"

PROMPTS = {"flux1-schnell": "castle on a pink background", "several-loras": "hamburger on a yellow background"}
THUMBNAIL = (384, 288)
NODES = {  # type: what its panel says when it is worth a picture
    "SVDQuantModelLoader": "kernels",
    "SVDQuantQuantizeCheckpoint": "relative error per layer",
    "SVDQuantCalibrate": "input rows seen",
    "SVDQuantLoraApply": "keys",
    "SVDQuantInspect": "relative",
    "SVDQuantCompare": "PSNR",
}


def main() -> None:
    """Make all pictures anew."""
    packs = {"ComfyUI-SVDQuant": ROOT, "svdquant_demo": DEMO / "custom_nodes" / "svdquant_demo"}
    models = {"vae_approx": ASSETS.glob("taef1_*.safetensors")}
    with ComfyHost(packs=packs, models=models) as host, chromium() as browser:
        folder = host.base / "models" / "diffusion_models"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(MODEL, folder)  # a link would not be previewed
        make_models(host.base / "models")
        host.set_settings(SETTINGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1100})
        canvas = Canvas(page, host.url)
        for file in sorted(EXAMPLES.glob("*.json")):
            thumbnail(host, canvas, file).save(file.with_suffix(".jpg"), quality=82)
            print(file.with_suffix(".jpg"))
        for node_type, text in NODES.items():
            picture = node(canvas, graph_with(node_type, host.object_info()), node_type, text)
            save_small(picture, DOCS / f"node-{node_type.removeprefix('SVDQuant').lower()}.png")


def thumbnail(host: ComfyHost, canvas: Canvas, file: Path) -> Image.Image:
    """What an example draws, or the example."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    if not any(n["type"] == "DualCLIPLoader" and "flux" in n["widgets_values"] for n in workflow["nodes"]):
        canvas.open(file)
        picture = photograph(canvas, canvas.look_at_graph(without=("MarkdownNote", "SaveImage")))
        return ImageOps.pad(picture, THUMBNAIL, Image.LANCZOS, "#141414")
    result = host.run(with_demo_model(workflow, host.object_info(), steps=20, **drawing(file)))
    drawn = [
        Image.open(io.BytesIO(host.view(image))).convert("RGB")
        for output in result.outputs.values()
        for key in ("svdquant_reference", "svdquant_image")
        for image in output.get(key, ())
    ]
    drawn += [image.convert("RGB") for image in result.images()]
    picture = Image.new("RGB", THUMBNAIL, "#222")
    side = min(THUMBNAIL[1], THUMBNAIL[0] // len(drawn))
    for index, image in enumerate(drawn):
        left = (THUMBNAIL[0] - side * len(drawn)) // 2 + index * side
        picture.paste(image.resize((side, side), Image.LANCZOS), (left, (THUMBNAIL[1] - side) // 2))
    return picture


def drawing(file: Path) -> dict:
    """What the demo model draws well."""
    return {"text": PROMPTS.get(file.stem, "fox on a green background"), "cfg": 2.5, "seed": 4}


def example_with(node_type: str) -> Path:
    """The example that shows a node best."""
    names = {
        "SVDQuantQuantizeCheckpoint": "quantize-your-checkpoint",
        "SVDQuantLoraApply": "several-loras",
        "SVDQuantCompare": "16-bit-against-4-bit",
    }
    return EXAMPLES / f"{names.get(node_type, 'flux1-dev')}.json"


def graph_with(node_type: str, types: dict) -> Graph:
    """A graph that shows a node, on the demo model."""
    graph = Graph()
    if node_type == "SVDQuantInspect":  # in no example
        graph.add(node_type, model_name=QUANTIZED)
        return graph
    if node_type == "SVDQuantCalibrate":  # nor this
        graph.add(
            node_type,
            model=graph.add("UNETLoader", unet_name=MODEL.name, weight_dtype="default")[0],
            positive=graph.add("SVDQuantDemoTextEncode", text="fox on a green background")[0],
            latent=graph.add("EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=1)[0],
            file_name="svdquant/calibration",
            if_exists="replace",
            **SAMPLING | {"cfg": 1.0, "steps": 8, "seed": 4},
        )
        return graph
    file = example_with(node_type)
    return with_demo_model(json.loads(file.read_text(encoding="utf-8")), types, steps=8, **drawing(file))


def node(canvas: Canvas, graph: Graph, node_type: str, text: str) -> Image.Image:
    """A node after its graph ran."""
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / "graph.json"
        saved.write_text(json.dumps(graph.to_api()))
        canvas.open(saved)
    canvas.queue()
    canvas.wait_for_text(".svdquant-panel", text)
    return photograph(canvas, canvas.stand_alone(node_type, 440))


def photograph(canvas: Canvas, box: list[float]) -> Image.Image:
    """A part of the page: [left, top, width, height]."""
    clip = dict(zip(("x", "y", "width", "height"), box, strict=True))
    return Image.open(io.BytesIO(canvas.page.screenshot(clip=clip))).convert("RGB")


def save_small(picture: Image.Image, file: Path) -> None:
    """As a PNG with a palette."""
    picture.quantize(128).save(file, optimize=True)
    print(file)


if __name__ == "__main__":
    main()
