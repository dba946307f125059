"""The loader's badge, as the browser asks for it: right about every file, closed to everything else."""

import json
import os
import random
import shutil
import time

import pytest
import small_flux
from safetensors.torch import save_file

from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint

LAYERS = len(small_flux.quantized_layers())


@pytest.fixture(scope="module")
def models(comfy):
    """The server's folder of diffusion models, with a 16-bit and a quantized file in ``badge``."""
    folder = comfy.base / "models" / "diffusion_models" / "badge"
    folder.mkdir(parents=True)
    save_file(small_flux.state_dict(), folder / "full.safetensors")
    settings = Settings(recipe="fast", rank=16)
    quantize_checkpoint(FileSource(folder / "full.safetensors"), folder / "int4.safetensors", settings)
    yield folder
    shutil.rmtree(folder)


def ask(comfy, name):
    """(status, answer) of the route."""
    response = comfy.http.get(f"{comfy.url}/api/svdquant/model", params={"name": name}, timeout=20)
    return response.status_code, response.json()


def test_a_quantized_file(comfy, models):
    status, badge = ask(comfy, "badge/int4.safetensors")
    assert status == 200 and badge["error"] is None
    assert (badge["family"], badge["quantized"], badge["recipe"], badge["ranks"]) == ("flux", True, "fast", [16])
    assert sum(badge["formats"].values()) == LAYERS
    size = (models / "int4.safetensors").stat().st_size
    assert badge["file_bytes"] == size
    assert size < badge["needed_bytes"] < size + 4e9
    assert 0 < badge["free_bytes"] <= badge["total_bytes"]
    assert badge["device"] == "cpu" and not badge["compiled_kernels"] and "cpu" in badge["kernels"]
    assert any("Slow here" in warning for warning in badge["warnings"])


def test_a_16_bit_file_is_sent_to_its_own_loader(comfy, models):
    status, badge = ask(comfy, "badge/full.safetensors")
    assert status == 200 and not badge["quantized"] and badge["formats"] == {"16-bit": LAYERS}
    assert "Load Diffusion Model" in badge["warnings"][0]


def test_no_damage_brings_the_server_down(comfy, models):
    """Cut, overwritten and lying files: an answer that names the file, and never a 500."""
    whole = (models / "int4.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little")
    dice = random.Random(0)
    damaged = [b"", whole[:5], whole[: header // 2], whole[:-1], b"pickle" * 99, (2**63).to_bytes(8, "little") * 9]
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(dice.choice((1, 5, 50))):
            data[dice.randrange(8 + header)] = dice.choice(b'0123456789{}[]",:AFIU_')
        damaged.append(bytes(data))
    described = 0
    for index, data in enumerate(damaged):
        (models / f"damaged{index}.safetensors").write_bytes(data)
        status, badge = ask(comfy, f"badge/damaged{index}.safetensors")
        assert status == 200
        if badge["error"]:
            described += f"damaged{index}.safetensors" in badge["error"]
            assert str(models) not in badge["error"]
    assert described > 40


def test_a_file_that_changes_is_read_again(comfy, models):
    changing = models / "changing.safetensors"
    shutil.copy(models / "int4.safetensors", changing)
    assert ask(comfy, "badge/changing.safetensors")[1]["quantized"]
    changing.write_bytes(b"no model any more")
    assert "changing.safetensors" in ask(comfy, "badge/changing.safetensors")[1]["error"]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "badge/none.safetensors",
        "../diffusion_models/badge/int4.safetensors",
        "badge/../badge/int4.safetensors",
        "/etc/passwd",
        "C:\\windows\\win.ini",
        "badge/int4.safetensors\0",
        "badge",
    ],
)
def test_only_names_that_the_host_lists_are_answered(comfy, models, name):
    status, answer = ask(comfy, name)
    assert status == 404 and answer["error"]


def test_a_link_out_of_the_model_folders_is_not_followed(comfy, models, tmp_path):
    secret = tmp_path / "secret.safetensors"
    shutil.copy(models / "int4.safetensors", secret)
    try:
        (models / "link.safetensors").symlink_to(secret)
        (models / "folder").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("links need a privilege here")
    for name in ("badge/link.safetensors", "badge/folder/secret.safetensors"):
        status, answer = ask(comfy, name)
        assert status == 200 and "leads out" in answer["error"] and "family" not in answer


def test_a_hundred_files_are_fast(comfy, models):
    for index in range(100):
        os.link(models / "int4.safetensors", models / f"many{index}.safetensors")
    ask(comfy, "badge/many0.safetensors")
    start = time.monotonic()
    for index in range(100):
        assert ask(comfy, f"badge/many{index}.safetensors")[1]["quantized"]
    assert time.monotonic() - start < 5


def test_the_header_alone_is_read(comfy, models):
    """A file of 40 GB (sparse, so that it takes no room) is described at once."""
    huge = models / "huge.safetensors"
    nbytes = 40 * 10**9
    entry = {"dtype": "BF16", "shape": [nbytes // 2], "data_offsets": [0, nbytes]}
    text = json.dumps({"weights": entry}).encode()
    with huge.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + nbytes)
    start = time.monotonic()
    status, badge = ask(comfy, "badge/huge.safetensors")
    assert status == 200 and "not a model this pack" in badge["error"]
    assert time.monotonic() - start < 3
