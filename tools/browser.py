"""ComfyUI's page in a headless Chromium, steered by Playwright: what a user does there, and what is to be seen."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False}  # no greeting, no graph of last time
VUE_NODES = "Comfy.VueNodes.Enabled"  # nodes as HTML ("Nodes 2.0") instead of on a canvas


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; ImportError or RuntimeError say what is missing."""
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        raise RuntimeError("there is no Chromium on this machine: `make browser` installs it")
    with sync_playwright() as steering:
        browser = steering.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # CI runs as root
        yield browser
        browser.close()


class Canvas:
    """ComfyUI's page: what a user does there, and what a test looks at."""

    def __init__(self, page, url: str) -> None:
        self.page = page
        self.errors: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.route(lambda address: not address.startswith(url), lambda route: route.abort())  # nothing from outside
        self._url = url
        self.load()

    def load(self) -> None:
        """Load the page, anew if it was loaded: with the settings that the server has now."""
        self.page.goto(self._url)
        self.page.wait_for_function("window.app?.canvas && document.querySelector('link[href$=\"/svdquant.css\"]')")
        self.page.wait_for_selector("#comfy-file-input", state="attached")

    def _note(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location['url']})")

    def open(self, file: Path) -> None:
        """Open a graph by its file, saved by the browser or in the API's format."""
        self.page.evaluate("app.graph.clear()")
        self.page.set_input_files("#comfy-file-input", file)
        self.page.wait_for_function("app.graph.nodes.length > 0")

    def add(self, node_type: str) -> None:
        """Put a node on an empty canvas."""
        self.page.evaluate(
            """type => { app.graph.clear(); const node = LiteGraph.createNode(type); node.pos = [60, 60];
            app.graph.add(node); app.canvas.ds.reset(); }""",
            node_type,
        )

    def set(self, node_type: str, widget: str, value: Any) -> None:
        """Choose a widget's value in the first node of a type."""
        self.page.evaluate(
            """([type, name, value]) => {
            const node = app.graph.nodes.find((node) => node.type === type);
            const widget = node.widgets.find((widget) => widget.name === name);
            widget.value = value; widget.callback?.(value); }""",
            [node_type, widget, value],
        )

    def look_at(self, node_type: str) -> list[float]:
        """Scroll a node into view, at its natural size; returns where it is: [left, top, width, height]."""
        return self.page.evaluate(
            """type => { const node = app.graph.nodes.find((node) => node.type === type);
            app.canvas.ds.reset(); app.canvas.centerOnNode(node); app.canvas.draw(true, true);
            const box = app.canvasEl.getBoundingClientRect(), { offset } = app.canvas.ds, title = 30, edge = 8;
            return [box.x + node.pos[0] + offset[0] - edge, box.y + node.pos[1] + offset[1] - title - edge,
                    node.size[0] + 2 * edge, node.size[1] + title + 2 * edge]; }""",
            node_type,
        )

    def stand_alone(self, node_type: str, width: int) -> list[float]:
        """Move a node away from all others, give it a width, and look at it."""
        self.page.evaluate(
            """([type, width]) => { const node = app.graph.nodes.find((node) => node.type === type);
            node.pos = [-5000, -5000]; node.setSize([width, node.size[1]]); }""",
            [node_type, width],
        )
        self.look_at(node_type)
        self.page.wait_for_timeout(1000)  # what was out of view is laid out now
        return self.look_at(node_type)

    def look_at_graph(self, without: Sequence[str] = ()) -> list[float]:
        """Zoom until the graph is in view; returns where it is, as :meth:`look_at`."""
        box = self.page.evaluate(
            """without => {
            const nodes = app.graph.nodes.filter((node) => !without.includes(node.type)), edge = 30, title = 30;
            const left = Math.min(...nodes.map((node) => node.pos[0])) - edge;
            const top = Math.min(...nodes.map((node) => node.pos[1])) - title - edge;
            const width = Math.max(...nodes.map((node) => node.pos[0] + node.size[0])) + edge - left;
            const height = Math.max(...nodes.map((node) => node.pos[1] + node.size[1])) + edge - top;
            const scale = Math.min(1200 / width, 780 / height), view = app.canvasEl.getBoundingClientRect();
            app.canvas.ds.scale = scale;
            app.canvas.ds.offset = [120 / scale - left, 130 / scale - top];
            app.canvas.draw(true, true);
            return [view.x + 120, view.y + 130, width * scale, height * scale]; }""",
            list(without),
        )
        self.page.wait_for_timeout(1000)
        return box

    def type_number(self, node_type: str, widget: str, value: Any) -> None:
        """Type another number into a widget, as a user does."""
        self.look_at(node_type)
        node_id, index, x, y = self.page.evaluate(
            """([type, name]) => {
            const node = app.graph.nodes.find((node) => node.type === type);
            const numbers = node.widgets.filter((widget) => widget.type === "number");
            const index = numbers.findIndex((widget) => widget.name === name);
            const box = app.canvasEl.getBoundingClientRect(), { offset } = app.canvas.ds;
            return [node.id, index, box.x + node.pos[0] + node.size[0] / 2 + offset[0],
                    box.y + node.pos[1] + (numbers[index].y ?? 0) + 10 + offset[1]]; }""",
            [node_type, widget],
        )
        field = self.page.locator(f'[data-node-id="{node_id}"] [role=spinbutton]').nth(index)
        if not self.page.evaluate("Boolean(app.ui.settings.getSettingValue('Comfy.VueNodes.Enabled'))"):
            self.page.mouse.dblclick(x, y)  # a canvas: this opens a field
            field = self.page.locator(".graphdialog input")
        field.select_text()
        field.press_sequentially(str(value))
        field.press("Enter")

    def queue(self) -> None:
        """Press Run."""
        self.page.keyboard.press("Control+Enter")

    def record(self, selector: str) -> None:
        """Keep every text that elements hold from now on, however briefly; :meth:`recorded` has them."""
        self.page.evaluate(
            """selector => { const texts = window.recordedTexts = [];
            new MutationObserver(() => {
              for (const shown of document.querySelectorAll(selector)) texts.push(shown.innerText);
            }).observe(document.body, { subtree: true, childList: true }); }""",
            selector,
        )

    def recorded(self) -> list[str]:
        """What :meth:`record` kept."""
        return self.page.evaluate("window.recordedTexts")

    def wait_for_text(self, selector: str, text: str, timeout: float = 300) -> str:
        """Wait until an element holds a text; returns all of it."""
        found = self.page.locator(selector, has_text=text).first
        found.wait_for(state="attached", timeout=timeout * 1000)
        return found.inner_text()

    def widgets(self) -> list:
        """[type, {widget: value}] of every node."""
        return self.page.evaluate(
            """() => app.graph.nodes.map((node) => [node.type, Object.fromEntries(
            (node.widgets ?? []).filter((w) => w.serialize !== false).map((w) => [w.name, w.value]))])"""
        )
