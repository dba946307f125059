"""The nodes on ComfyUI's canvas, as a user meets them."""

import json
import time

import pytest

from demo.settings import MODEL, VAE
from tools.comfy_host import Graph

PANEL = ".svdquant-panel"


def quantizing(name, steps=2, recipe="balanced"):
    """A graph that quantizes the demo model, draws in 16 and 4 bits and compares."""
    graph = Graph()
    full = graph.add("UNETLoader", unet_name=MODEL.name, weight_dtype="default")
    prompt = graph.add("SVDQuantDemoTextEncode", text="fox on a green background")
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    quantizer = graph.add(
        "SVDQuantQuantizeCheckpoint",
        model=full[0],
        file_name=name,
        precision="int4",
        recipe=recipe,
        rank=32,
        steps=steps,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        seed=0,
        skip_layers="",
        overwrite=True,
        positive=prompt[0],
        latent=latent[0],
    )
    vae = graph.add("VAELoader", vae_name=VAE)
    images = []
    for model in (full, quantizer):
        samples = graph.add(
            "KSampler",
            model=model[0],
            seed=1,
            steps=3,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=prompt[0],
            negative=prompt[0],
            latent_image=latent[0],
            denoise=1.0,
        )
        images.append(graph.add("VAEDecode", samples=samples[0], vae=vae[0]))
    graph.add("SVDQuantCompare", reference=images[0][0], image=images[1][0], gain=4.0)
    return graph


def saved(tmp_path, graph):
    """A graph's file, in the API's format."""
    file = tmp_path / "graph.json"
    file.write_text(json.dumps(graph.to_api()))
    return file


def test_the_loaders_badge(canvas, site):
    canvas.add("SVDQuantModelLoader")
    canvas.set("SVDQuantModelLoader", "model_name", "browser/good.safetensors")
    badge = canvas.wait_for_text(PANEL, "svdquant_w4a4")
    for fact in (
        "flux",
        "svdquant_w4a4 (2 layers)",
        "svdquant_w4a4_rotated (18 layers)",
        "rank 32",
        "fast",
        "needs about",
        "free",
        "kernels:",
        "Slow here",
    ):
        assert fact in badge
    canvas.set("SVDQuantModelLoader", "model_name", "browser/full.safetensors")
    assert "rank" not in canvas.wait_for_text(PANEL, "Load Diffusion Model")
    canvas.set("SVDQuantModelLoader", "model_name", "browser/corrupt.safetensors")
    error = canvas.wait_for_text(f"{PANEL} .svdquant-error", "corrupt.safetensors")
    assert str(site.base) not in error
    canvas.set("SVDQuantModelLoader", "model_name", "gone.safetensors")
    canvas.wait_for_text(PANEL, "gone.safetensors is not in models/diffusion_models")


def test_the_badge_is_inside_its_node(canvas):
    canvas.add("SVDQuantModelLoader")
    canvas.set("SVDQuantModelLoader", "model_name", "browser/good.safetensors")
    canvas.wait_for_text(PANEL, "Slow here")
    inside = """() => {
        const panel = document.querySelector('.svdquant-panel').getBoundingClientRect();
        const content = document.querySelector('.svdquant-content').getBoundingClientRect();
        const node = app.graph.nodes[0], [, , , height] = node.boundingRect ?? node.getBounding();
        return content.bottom <= panel.bottom + 1 && panel.height < height * app.canvas.ds.scale + 1; }"""
    canvas.page.wait_for_function(inside)


def test_a_graph_is_opened_changed_queued_and_watched_to_the_end(canvas, tmp_path):
    canvas.open(saved(tmp_path, quantizing("browser/made")))
    canvas.type_number("SVDQuantQuantizeCheckpoint", "steps", 8)
    assert dict(canvas.widgets())["SVDQuantQuantizeCheckpoint"]["steps"] == 8
    canvas.record(PANEL)
    canvas.queue()
    done = canvas.wait_for_text(PANEL, "28 layers quantized")
    running = [text for text in canvas.recorded() if "Cancel" in text]
    for told in ("Calibrating", "sampling step 8 of 8", "Quantizing", "left in this stage", "mean error", "/ "):
        assert any(told in text for text in running), told
    assert "relative error per layer" in done
    assert canvas.page.locator(".svdquant-layer").count() == 28
    assert "single_blocks.0.linear1" in canvas.page.locator(".svdquant-chart").inner_text()

    text = canvas.wait_for_text(PANEL, "PSNR")
    assert "SSIM 0." in text
    canvas.page.wait_for_function(
        """() => { const shown = [...document.querySelectorAll('.svdquant-slider img')];
        return shown.length === 2 && shown.every((image) => image.naturalWidth === 128); }"""
    )
    canvas.look_at("SVDQuantCompare")
    canvas.page.locator(".svdquant-position").fill("25")
    assert "25%" in canvas.page.locator(".svdquant-above").get_attribute("style")


def test_cancel_works_at_once(canvas, site, tmp_path):
    canvas.open(saved(tmp_path, quantizing("browser/cancelled", steps=2, recipe="best")))
    canvas.queue()
    canvas.wait_for_text(PANEL, "Quantizing")
    start = time.monotonic()
    canvas.page.locator(".svdquant-button", has_text="Cancel").dispatch_event("click")
    canvas.wait_for_text(PANEL, "Cancelled. The same again goes on where this stopped.")
    assert time.monotonic() - start < 10, "the rest of it takes longer"
    assert not (site.base / "models/diffusion_models/browser/cancelled.safetensors").exists()


def test_calibration_is_watched_to_the_end(canvas, tmp_path):
    graph = Graph()
    full = graph.add("UNETLoader", unet_name=MODEL.name, weight_dtype="default")
    graph.add(
        "SVDQuantCalibrate",
        model=full[0],
        positive=graph.add("SVDQuantDemoTextEncode", text="fox on a green background")[0],
        latent=graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)[0],
        file_name="browser/calibration",
        if_exists="replace",
        steps=3,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        seed=int(time.time()),  # not what the server remembers
    )
    canvas.open(saved(tmp_path, graph))
    canvas.record(PANEL)
    canvas.queue()
    canvas.wait_for_text(PANEL, "calibration.safetensors: 28 layers")
    assert any("sampling step 3 of 3" in text and "Calibrating" in text for text in canvas.recorded())


def test_lora_rows_grow_move_and_say_what_matched(canvas, tmp_path):
    graph = Graph()
    model = graph.add("SVDQuantModelLoader", model_name="browser/good.safetensors")
    lora = graph.add("SVDQuantLoraApply", model=model[0], lora_name="browser/style.safetensors", strength=0.5)
    graph.add("SVDQuantInspect", model_name="browser/good.safetensors", model=lora[0])
    canvas.open(saved(tmp_path, graph))
    node = "SVDQuantLoraApply"

    def shown():
        return canvas.page.evaluate(
            """() => app.graph.nodes.find((node) => node.type === 'SVDQuantLoraApply').widgets
            .filter((widget) => /^lora_name/.test(widget.name) && !widget.hidden).map((widget) => widget.name)"""
        )

    assert shown() == ["lora_name", "lora_name_2"]
    canvas.set(node, "lora_name_2", "browser/detail.safetensors")
    canvas.set(node, "strength_2", 0.25)
    assert shown() == ["lora_name", "lora_name_2", "lora_name_3"]
    canvas.set(node, "lora_name_3", "browser/style.safetensors")
    canvas.set(node, "lora_name_3", "None")
    assert shown() == ["lora_name", "lora_name_2", "lora_name_3"]

    lines = canvas.page.locator(".svdquant-lora")
    lines.nth(1).locator("button", has_text="▲").dispatch_event("click")
    values = dict(canvas.widgets())[node]
    assert (values["lora_name"], values["strength"]) == ("browser/detail.safetensors", 0.25)
    assert (values["lora_name_2"], values["strength_2"]) == ("browser/style.safetensors", 0.5)
    lines.nth(1).locator("input").dispatch_event("click")
    assert dict(canvas.widgets())[node]["on_2"] is False

    canvas.queue()
    assert "detail" in canvas.wait_for_text(".svdquant-lora", "2 of 2 keys")
    assert "svdquant_w4a4" in canvas.wait_for_text(".svdquant-table", "single_blocks.0.linear1")
    assert "rank" in lines.nth(0).inner_text() and "2 of 2 keys" not in lines.nth(1).inner_text()

    file = tmp_path / "rows.json"
    file.write_text(json.dumps(canvas.page.evaluate("app.graph.serialize()")))
    before = canvas.widgets()
    canvas.open(file)
    assert canvas.widgets() == before and len(shown()) == 3


def test_every_node_comes_back_as_it_was_saved(canvas, site, tmp_path):
    types = sorted(name for name, node in site.object_info().items() if node["category"] == "SVDQuant")
    changed = canvas.page.evaluate(
        """(types) => { for (const [index, type] of types.entries()) {
            const node = LiteGraph.createNode(type);
            node.pos = [(index % 3) * 500, Math.floor(index / 3) * 700];
            app.graph.add(node);
            for (const widget of node.widgets ?? []) {
              const choices = widget.options?.values;
              if (widget.serialize === false) continue;
              else if (Array.isArray(choices)) widget.value = choices.at(-1);
              else if (typeof widget.value === 'boolean') widget.value = !widget.value;
              else if (typeof widget.value === 'number') widget.value += widget.options.step2 ?? 1;
              else if (typeof widget.value === 'string') widget.value = `changed ${widget.name}`;
            } }
            return app.graph.serialize(); }""",
        types,
    )
    before = canvas.widgets()
    assert len(before) == len(types) and sum(len(values) for _, values in before) > 15
    file = tmp_path / "every.json"
    file.write_text(json.dumps(changed))
    canvas.open(file)
    assert canvas.widgets() == before
    # Nothing of the panels is in what the server gets.
    prompt = canvas.page.evaluate("app.graphToPrompt().then((made) => made.output)")
    for node in prompt.values():
        info = site.object_info()[node["class_type"]]["input"]
        assert node["inputs"].keys() <= {**info.get("required", {}), **info.get("optional", {})}.keys()


@pytest.mark.parametrize("name", ["flux1-dev", "quantize-your-checkpoint", "several-loras"])
def test_the_example_workflows_open(canvas, name):
    canvas.page.evaluate(
        """async (name) => { const response = await fetch(`/api/workflow_templates/ComfyUI-SVDQuant/${name}.json`);
        await app.loadGraphData(await response.json()); }""",
        name,
    )
    assert canvas.page.evaluate("app.graph.nodes.every((node) => node.type in LiteGraph.registered_node_types)")
    assert any(node.startswith("SVDQuant") for node, _ in canvas.widgets())


def test_the_panels_speak_the_users_language(window, site):
    """In the page of the other tests, loaded anew: the language is asked for once."""
    canvas, _ = window
    site.set_settings({"Comfy.Locale": "zh"})
    try:
        canvas.load()
        canvas.add("SVDQuantModelLoader")
        canvas.set("SVDQuantModelLoader", "model_name", "browser/good.safetensors")
        badge = canvas.wait_for_text(PANEL, "svdquant_w4a4")
        for text in ("秩 32", "内核:", "此处较慢"):
            assert text in badge
    finally:
        site.set_settings({"Comfy.Locale": "en"})
        canvas.load()
