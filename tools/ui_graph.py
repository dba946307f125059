"""Graphs as the browser saves them: checked against a server's node types, and turned into the API's form.

The browser does the same when a graph is queued. Tests of saved graphs need it without a browser.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tools.comfy_host import Graph

NOTES = {"Note", "MarkdownNote"}  # in the browser only
FILES = re.compile(r"(unet|model|clip|vae|lora)_name\d?(_\d)?")  # inputs whose values are the user's own files
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def to_api(workflow: Mapping[str, Any], types: Mapping[str, Any]) -> Graph:
    """The graph to queue.

    Args:
        workflow: a saved graph, of version 0.4 (no subgraphs).
        types: the server's ``/object_info``.

    Raises:
        ValueError: a node, an input, a link or a value (but for model files) that the server does not know.
    """
    links = {link[0]: link for link in workflow["links"]}
    graph = Graph()
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        if node["type"] not in types:
            raise ValueError(f"node {node['id']}: the server has no {node['type']}")
        graph.nodes[str(node["id"])] = {"class_type": node["type"], "inputs": dict(_inputs(node, links, types))}
    for node_id, node in graph.nodes.items():
        _check_links(node_id, node, graph, types)
    return graph


def _inputs(node: Mapping, links: Mapping, types: Mapping) -> Iterator[tuple[str, Any]]:
    where = f"node {node['id']} ({node['type']})"
    specs = _specs(types[node["type"]])
    slots = {slot["name"]: slot for slot in node.get("inputs", ())}
    if unknown := slots.keys() - specs.keys():
        raise ValueError(f"{where} has no inputs {sorted(unknown)}")
    values = iter(node.get("widgets_values", ()))
    required = types[node["type"]]["input"].get("required", {})
    for name, (kind, options) in specs.items():
        link = slots.get(name, {}).get("link")
        if isinstance(kind, list) or kind in WIDGETS:
            try:
                value = next(values)
                if options.get("control_after_generate") and next(values) not in ("fixed", "randomize", "increment"):
                    raise ValueError(f"{where}: {name} lacks its control_after_generate")
            except StopIteration:
                if name in required:
                    raise ValueError(f"{where}: no value is saved for {name}") from None
                continue  # an input that is newer than the graph
            if not _fits(name, value, kind, options):
                raise ValueError(f"{where}: {name} cannot be {value!r}")
            if link is None:
                yield name, value
        elif link is None and name in required:
            raise ValueError(f"{where}: {name} is not connected")
        if link is not None:
            yield name, [str(links[link][1]), links[link][2]]
    if rest := list(values):
        raise ValueError(f"{where}: the values {rest} belong to no widget")


def _specs(type_: Mapping) -> dict[str, tuple[Any, Mapping]]:
    groups = (type_["input"].get(group, {}) for group in ("required", "optional"))
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for group in groups for name, spec in group.items()}


def _fits(name: str, value: Any, kind: Any, options: Mapping) -> bool:
    choices = kind if isinstance(kind, list) else options.get("options")
    if kind in ("INT", "FLOAT"):
        number = isinstance(value, int if kind == "INT" else (int, float)) and not isinstance(value, bool)
        return number and options.get("min", value) <= value <= options.get("max", value)
    if choices is not None:
        return value in choices or bool(FILES.fullmatch(name) and str(value).endswith(".safetensors"))
    return isinstance(value, bool if kind == "BOOLEAN" else str)


def _check_links(node_id: str, node: Mapping, graph: Graph, types: Mapping) -> None:
    specs = _specs(types[node["class_type"]])
    for name, value in node["inputs"].items():
        if not isinstance(value, list):
            continue
        source, slot = value
        outputs = types[graph.nodes[source]["class_type"]]["output"]
        if slot >= len(outputs) or outputs[slot] != specs[name][0]:
            raise ValueError(f"node {node_id} ({node['class_type']}): {name} is linked to something else")
