"""The whole way in a real ComfyUI: quantize the demo model, draw with it, compare with 16 bits.

    make demo

Starts the server, queues two graphs through its HTTP API, and leaves the pictures side by side and a
report in ``demo-output``.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from demo.compare import psnr, sheet, ssim
from demo.settings import ASSETS, CALIBRATION, CALIBRATION_PROMPTS, DEMO, MODEL, PROMPTS, SAMPLING, SIZE, VAE
from svdq_core.formats.comfy_quant import QuantizedCheckpoint
from tools.comfy_host import ComfyHost, Graph, GraphError, HostError, Node, Progress, Result

ROOT = DEMO.parent
OUTPUT = ROOT / "demo-output"
QUANTIZED = "svdquant/demo_int4"


def main() -> None:
    """Run the demo; exits with one line if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help="how many pictures to draw")
    prompts = PROMPTS[:: max(1, len(PROMPTS) // parser.parse_args().prompts)][: parser.parse_args().prompts]
    start = time.monotonic()
    try:
        report = run(prompts)
    except (GraphError, HostError) as error:
        sys.exit(f"The demo failed: {error}")
    report["seconds"] = round(time.monotonic() - start, 1)
    (OUTPUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(tabulate([(key, value) for key, value in report.items() if key != "images"]))
    print(f"pictures: {OUTPUT / 'side_by_side.png'}")


def run(prompts: list[str]) -> dict:
    """Quantize, draw and compare; returns the report."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    packs = {"ComfyUI-SVDQuant": ROOT, "svdquant_demo": DEMO / "custom_nodes" / "svdquant_demo"}
    models = {"diffusion_models": [MODEL], "vae_approx": ASSETS.glob("taef1_*.safetensors")}
    print("starting ComfyUI ...")
    with ComfyHost(packs=packs, models=models) as host:
        version = host.get("/system_stats").json()["system"]["comfyui_version"]
        print(f"ComfyUI {version}")
        graph, _ = quantize_graph()
        run_graph(host, graph, "calibrate and quantize")
        graph, saved = draw_graph(prompts)
        result = run_graph(host, graph, "draw in 16 and 4 bits")
        full, quantized = ([result.images(node)[0].convert("RGB") for node in nodes] for nodes in saved)
        file = host.base / "models" / "diffusion_models" / f"{QUANTIZED}.safetensors"
        report = measure(file, prompts, full, quantized) | {"host_version": version}
        shutil.copy(file, OUTPUT)
    sheet(prompts, full, quantized).save(OUTPUT / "side_by_side.png")
    return report


def quantize_graph() -> tuple[Graph, Node]:
    """Load the 16-bit model, calibrate on prompts, write a 4-bit file."""
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=MODEL.name, weight_dtype="default")
    clip = graph.add("SVDQuantDemoCLIP")
    positive = graph.add("SVDQuantPrompts", clip=clip[0], prompts="\n".join(CALIBRATION_PROMPTS))
    quantizer = graph.add(
        "SVDQuantQuantizeCheckpoint",
        model=model[0],
        file_name=QUANTIZED,
        precision="int4",
        recipe="balanced",
        rank=32,
        seed=0,
        skip_layers="",
        overwrite=True,
        positive=positive[0],
        negative=graph.add("SVDQuantDemoTextEncode", text="")[0],
        latent=empty_latent(graph),
        **CALIBRATION,
    )
    return graph, quantizer


def draw_graph(prompts: list[str]) -> tuple[Graph, tuple[list[Node], list[Node]]]:
    """The same prompts and seeds with the 16-bit and the 4-bit model, through stock nodes."""
    graph = Graph()
    full = graph.add("UNETLoader", unet_name=MODEL.name, weight_dtype="default")
    quantized = graph.add("SVDQuantModelLoader", model_name=f"{QUANTIZED}.safetensors")
    vae = graph.add("VAELoader", vae_name=VAE)
    negative = graph.add("SVDQuantDemoTextEncode", text="")
    latent = empty_latent(graph)
    encoded = [graph.add("SVDQuantDemoTextEncode", text=text) for text in prompts]
    saved = []
    for name, model in (("16bit", full), ("4bit", quantized)):
        saved.append([])
        for seed, positive in enumerate(encoded):
            samples = graph.add(
                "KSampler",
                model=model[0],
                seed=seed,
                positive=positive[0],
                negative=negative[0],
                latent_image=latent,
                denoise=1.0,
                **SAMPLING,
            )
            image = graph.add("VAEDecode", samples=samples[0], vae=vae[0])
            saved[-1].append(graph.add("SaveImage", images=image[0], filename_prefix=name))
    return graph, (saved[0], saved[1])


def empty_latent(graph: Graph) -> list:
    """An empty latent of the demo's size."""
    return graph.add("EmptySD3LatentImage", width=SIZE, height=SIZE, batch_size=1)[0]


def run_graph(host: ComfyHost, graph: Graph, title: str) -> Result:
    """Run a graph with a progress bar over all its nodes' steps."""
    with tqdm(desc=title, unit="step", mininterval=0.5) as bar:
        current = None

        def show(step: Progress) -> None:
            nonlocal current
            if step.node != current:
                current = step.node
                bar.reset(step.max)
            bar.update(step.value - bar.n)

        return host.run(graph, show)


def measure(file: Path, prompts: list[str], full: list[Image.Image], quantized: list[Image.Image]) -> dict:
    """Quality and size."""
    checkpoint = QuantizedCheckpoint(file)
    images = {
        prompt: {"psnr_db": round(psnr(*pair), 2), "ssim": round(ssim(*pair), 4)}
        for prompt, pair in zip(prompts, zip(quantized, full, strict=True), strict=True)
    }
    layers = checkpoint.layers.values()
    return {
        "psnr_db": round(statistics.mean(image["psnr_db"] for image in images.values()), 2),
        "ssim": round(statistics.mean(image["ssim"] for image in images.values()), 4),
        "file_bytes_16bit": MODEL.stat().st_size,
        "file_bytes_4bit": file.stat().st_size,
        "size_ratio": round(sum(x.nbytes_16bit for x in layers) / sum(x.nbytes for x in layers), 3),
        "layers_quantized": len(checkpoint.layers),
        "images": images,
    }


if __name__ == "__main__":
    main()
