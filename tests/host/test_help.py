"""Help pages and translations: there for every node, and about nothing that is not there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nodes(comfy):
    """Our nodes as the server describes them."""
    return {name: info for name, info in comfy.object_info().items() if info["category"] == "SVDQuant"}


def inputs(info):
    """Names of a node's inputs."""
    return {name for group in ("required", "optional") for name in info["input"].get(group, {})}


def test_the_host_shows_help_for_every_node_in_two_languages(comfy, nodes):
    for name, info in nodes.items():
        pack = info["python_module"].split(".")[-1]
        for page, title in ((f"{name}.md", info["display_name"]), (f"{name}/zh.md", "SVDQuant ")):
            text = comfy.get(f"/extensions/{pack}/docs/{page}").content.decode()
            assert text.startswith(f"# {title}") and len(text) > 150, page
    assert {path.stem for path in (ROOT / "web/docs").glob("*.md")} == nodes.keys()


def test_help_speaks_of_inputs_and_outputs_that_exist(nodes):
    for page in (ROOT / "web/docs").rglob("*.md"):
        info = nodes[page.stem if page.stem in nodes else page.parent.name]
        named = [line.split("`")[1] for line in page.read_text("utf-8").splitlines() if line.startswith("| `")]
        assert named and set(named) <= inputs(info) | set(info["output_name"]), page


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_name_every_input(comfy, nodes, language):
    texts = comfy.get("/i18n").json()[language]["nodeDefs"]
    assert texts.keys() == nodes.keys()
    for name, text in texts.items():
        assert set(text["inputs"]) == inputs(nodes[name]), name
        assert text["display_name"] and all(entry["name"] for entry in text["inputs"].values())


def test_chinese_is_complete(comfy, nodes):
    for name, text in comfy.get("/i18n").json()["zh"]["nodeDefs"].items():
        outputs = text["outputs"].values()
        assert len(outputs) == len(nodes[name]["output"]), name
        tips = [text["description"], *(entry["tooltip"] for entry in (*text["inputs"].values(), *outputs))]
        assert all(any("\u4e00" <= sign <= "\u9fff" for sign in tip) for tip in tips), name


def panel_texts():
    """What the browser's panels say: in their code, and the warnings that the server sends them."""
    code = "".join(path.read_text("utf-8") for path in (ROOT / "web").glob("*.js"))
    badge = ast.parse((ROOT / "svdq_core/host/badge.py").read_text("utf-8"))
    (warnings,) = (node for node in badge.body if getattr(node, "name", "") == "_warnings")
    sent = {node.value for node in ast.walk(warnings) if isinstance(node, ast.Constant)}
    return {*re.findall(r'say\("([^"]+)"', code), *sent}


def test_every_text_of_the_panels_is_translated(comfy):
    translated = comfy.get("/i18n").json()["zh"]["svdquant"]
    assert translated.keys() == panel_texts()
    for text, chinese in translated.items():
        assert any("\u4e00" <= sign <= "\u9fff" for sign in chinese), text
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", chinese)), text
