"""README's numbers are those of benchmarks/results, its links lead somewhere."""

import json
import re
import statistics
from pathlib import Path

import pytest

from svdq_core.quantizer.pipeline import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "benchmarks" / "results").glob("*.json")}


def section(title):
    """The text under a heading."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(title, first_column):
    """Rows of the section's table whose first column has that head, as cells."""
    lines = section(title).splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith(f"| {first_column} |".replace("  ", " ")))
    rows = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def psnr(row):
    return f"{row['psnr_db']:.2f} ± {row['psnr_db_standard_error']:.2f}"


def test_precisions():
    result = RESULTS["demo_precisions"]
    measured = [
        [f"`{row['precision']}`", f"`{row['modulations']}`", psnr(row), f"{row['ssim']:.3f}", f"{row['file_mb']:.1f}"]
        for row in result["precisions"].values()
    ]
    assert table("Precisions", "body") == measured
    assert f"{result['prompts']} prompts" in section("Precisions")
    assert f"{result['file_mb_16bit']:.1f} MB" in section("Precisions")


def test_sizes_of_flux():
    sizes = RESULTS["flux_sizes"]["FLUX.1-dev"]
    for precision, _, written, _ in table("Precisions", "precision"):
        if "modulations" not in precision:
            precision = precision.strip("`")
            modulations = Settings(precision).modulation_precision
            entry = sizes["precisions at rank 32"][f"{precision}, modulations {modulations}"]
            assert written == f"{entry['file_bytes'] / 1e9:.1f} GB"


def test_quality():
    measured = [
        [name, str(row["rank"]), psnr(row), f"{row['ssim']:.3f}"]
        for name, row in RESULTS["demo_quality"]["methods"].items()
    ]
    assert table("Quality", "method") == measured
    assert f"{RESULTS['demo_quality']['prompts']} prompts" in section("Quality")


def test_lora():
    drawn, changed, text = RESULTS["demo_lora"], RESULTS["lora_strength"], section("LoRA")
    assert f"on {drawn['prompts']} prompts" in text
    for key in ("psnr_int4_lora_to_16bit_lora", "psnr_int4_to_16bit"):
        assert f"{drawn[key]['db']:.2f} ± {drawn[key]['standard_error']:.2f} dB" in text
    assert f"{drawn['psnr_16bit_lora_to_16bit']['db']:.2f} dB" in text
    assert f"{changed['change_seconds']:.2f} s" in text
    assert f"{changed['quantized_layers']} layers" in text and f"{changed['lora_layers']} of" in text


def test_peers():
    measured = [[name, psnr(row), f"{row['ssim']:.3f}"] for name, row in RESULTS["demo_peers"]["methods"].items()]
    assert table("Quality", "") == measured


def test_evaluation_in_8_bits():
    files = RESULTS["demo_evaluation"]["files"]
    measured = [
        [*(f"`{name}`" for name in title.split(", modulations ")), psnr(row["as stored"]), psnr(row["in 8 bits"])]
        for title, row in files.items()
    ]
    assert table("Quality", "body") == measured
    gains = [row["in 8 bits"]["psnr_db"] - row["as stored"]["psnr_db"] for row in files.values()]
    text = f"{min(gains):.1f} to {max(gains):.1f} dB closer"
    assert text in section("Quality")
    assert text in (ROOT / "docs/formats.md").read_text(encoding="utf-8").replace("\n", " ")


def test_synthetic_layers():
    result, text = RESULTS["synthetic_layers"], section("Quality")
    for name in ("balanced", "best"):
        assert f"{result['mean'][f'ours, {name}']['gain_db']:.2f} dB" in text
    assert f"{result['mean']['only inputs rounded']['gain_db']:.2f} dB" in text
    assert result["command"] in text


def test_speed_of_other_precisions():
    result, text = RESULTS["precisions_h200"], section("Speed on an H200")
    for row in result["layers"]:
        cells = [f"{row[f'{name}_us']:.0f} ({row[f'{name}_speedup']:.2f}x)" for name in ("int8", "nvfp4")]
        shape = f"{row['m']} x {row['k']} x {row['n']}"
        assert f"| {shape} | {row['16bit_us']:.0f} | {cells[0]} | {cells[1]} | {row['nvfp4_exact_us']:.0f} |" in text
    for row in result["modulations"]:
        if row["m"] in (1, 8):
            share = f"{row['share_of_copy_bandwidth']:.0%}".replace("%", " %")
            shape = f"{row['m']} x {row['k']} x {row['n']}"
            times = " | ".join(f"{row[f'{name}_us']:.1f}" for name in ("16bit", "int8", "w4a16", "copy"))
            assert f"| {shape} | {times} | {share} |" in text
    together: dict[int, list[str]] = {}
    for row in result["modulations_together"]:
        times = [f"{row[name]:.0f}" for name in ("us", "one_by_one_us")]
        share = f"{row['share_of_copy_bandwidth']:.0%}".replace("%", " %")
        together.setdefault(row["m"], [f"{row['m']}"]).extend([*times, share])
        if row["m"] == 1:
            assert f"{row['precision'].upper()} ({row['bytes'] / 1e9:.2f} GB" in text
    assert table("Speed on an H200", "rows") == list(together.values())
    for mean in result["geometric_mean_over_16bit_flux"].values():
        assert f"{mean:.2f}x" in text
    lora = result["lora"]
    assert f"moves their time, {lora['flux_step_us'] / 1e3:.0f} ms a step, by {100 * abs(lora['cost']):.1f} %" in text


def test_int4_speed():
    result, text = RESULTS["hopper_h200"], section("Speed on an H200")
    peers = ("nf4", "kitchen_convrot_w4a4", "kitchen_w4a8", "kitchen_int8", "kitchen_svdquant", "fp8_gemm", "int8_gemm")
    measured = []
    for row in result["results"]:
        times = [f"{row[f'{name}_us']:.0f}" for name in ("layer", "exact", "16bit", *peers)]
        times[2] += f" ({row['speedup_over_16bit']:.2f}x)"
        measured.append([f"{row['m']} x {row['k']} x {row['n']}", *times])
    assert table("Speed on an H200", "shape") == measured
    assert f"{result['geometric_mean_over_16bit_flux']:.2f}x over the five" in text.replace("\n", " ")
    assert f"exact W4A4: {result['exact_geometric_mean']:.2f}x" in text
    first, flux = result["results"][0], result["results"][:5]
    inputs = [f"{100 * first[f'{kind}input_error_bf16']:.0f} %" for kind in ("exact_", "")]
    assert f"falls from {inputs[0]} of the output to {inputs[1]}" in text.replace("\n", " ")
    ratios = [row["layer_us"] / row["fp8_gemm_us"] for row in flux]
    assert f"{min(ratios):.2f} to {max(ratios):.2f} times what torch's FP8 product" in text
    shapes = {f"{row['m']} x {row['k']} x {row['n']}, us": row for row in result["results"]}
    lines = table("Speed on an H200", "rank")
    for (shape, *times), (_, *exact) in zip(lines[::2], lines[1::2], strict=True):
        for kind, found in (("", times), ("exact_", exact)):
            assert found == [f"{shapes[shape][f'{kind}rank{rank}_us']:.0f}" for rank in (0, 16, 32, 64, 128)]


def test_making_weights_in_8_bits():
    made, text = RESULTS["as_int8_h200"], section("Speed on an H200").replace("\n", " ")
    assert f"all {made['layers']} of them are made in {made['seconds']:.2f} s and take {made['kept_gb']:.1f} GB" in text
    assert f"and {made['most_beside_gb']:.1f} GB while they are made" in text


def test_quantizing_at_full_size():
    models = RESULTS["full_size_h200"]["models"]
    measured = [
        [name, f"`{case[1]}`", f"`{case[0]}`", *(f"{run[k]:.1f}" for k in ("seconds", "peak_gpu_gb", "peak_host_gb"))]
        for name, key in (("FLUX.1-dev", "flux1-dev"), ("SDXL", "sdxl"))
        for case, run in ((name.split(", "), run) for name, run in models[key].items())
    ]
    assert table("On the command line", "model") == measured


def test_seeds():
    seeds = RESULTS["demo_seeds"]
    measured = [
        [name, *(f"{value:.2f}" for value in row["psnr_db"]), f"{row['mean']:.2f} ± {row['standard_deviation']:.2f}"]
        for name, row in seeds["methods"].items()
    ]
    assert table("Quality", "recipe, rank 32") == measured
    assert f"{seeds['prompts']} of the prompts" in section("Quality")


def test_whole_images():
    images = RESULTS["flux_images_h200"]
    names = [name for name in images if isinstance(images[name], dict) and "model_gb" in images[name]]
    measured = []
    for name, found in ((name, images[name]) for name in names):
        assert found["resident_gb"] == found["model_gb"], "offloaded"
        seconds = f"{statistics.median(found['image_s']):.2f}" if "image_s" in found else ""
        peak = f"{found['peak_gb']:.2f}" if "peak_gb" in found else ""
        measured.append([name, seconds, f"{found['model_gb']:.2f}", peak])
    assert table("FLUX.1-dev in ComfyUI", "model") == measured
    assert f"holds {measured[-1][3]} GB while" in README.replace("\n", " ")
    images, measured = RESULTS["sdxl_images_h200"], []
    for name in ("16 bits", "INT4"):
        launched, replayed = images[name], images[f"{name}, replayed"]
        seconds = [f"{statistics.median(found['image_s']):.2f}" for found in (launched, replayed)]
        peaks = f"{launched['peak_gb']:.2f}, {replayed['peak_gb']:.2f}"
        measured.append([name, *seconds, f"{launched['model_gb']:.2f}", peaks])
    text = README[README.index("**SDXL**'s layers") :]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[5:7]] == measured


def test_calibrating():
    cost, text = RESULTS["calibration_cost_h200"], section("On the command line").replace("\n", " ")
    many, one, offloaded = (
        cost[name] for name in ("4 prompts of 20 steps", "1 prompt of 8 steps", "more than the card holds")
    )
    assert f"four prompts of 20 steps take {100 * many['slowdown']:.1f} % longer" in text
    for run in (one, offloaded):
        assert f"{run['watched_s']:.2f} s instead of {sum(run['plain_s']) / 2:.2f}" in text
    assert f"with {offloaded['free_gb']:.1f} GB of the card free" in text
    assert f"{offloaded['resident_gb']:.1f} of the model's {offloaded['model_gb']:.1f} GB on it" in text
    assert f"{offloaded['steps']} steps" in text and offloaded["same_statistics_as_on_the_whole_card"]
    image = RESULTS["demo_calibration"]["image_seconds"]
    assert f"{image['watched']:.2f} s instead of {image['plain']:.2f} on" in text


@pytest.mark.parametrize("page", ["README.md", "docs/formats.md", "demo/README.md", "csrc/NOTES.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_every_result_names_the_command_that_made_it():
    for name, result in RESULTS.items():
        assert result["command"].startswith("python -m benchmarks."), name
