"""A real browser on a real server."""

import contextlib
import shutil
import time

import pytest
from safetensors.torch import save_file

from demo.examples import random_lora
from demo.settings import MODEL
from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint
from tools.browser import SETTINGS, VUE_NODES, Canvas, chromium

PATIENCE = 300  # seconds for anything to appear: a busy machine is no failure
WHY = "no browser to test in: they need Chromium (`make browser`) and the Python package playwright"


def pytest_terminal_summary(terminalreporter):
    """Say how much was left untested for want of a browser."""
    skipped = [report for report in terminalreporter.getreports("skipped") if WHY in str(report.longrepr)]
    if skipped:
        terminalreporter.section("Browser")
        terminalreporter.line(f"{len(skipped)} browser tests skipped: {WHY}")


@pytest.fixture(scope="session")
def browser():
    """Chromium, without a window."""
    with contextlib.ExitStack() as stack:
        try:
            browser = stack.enter_context(chromium())
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{WHY} ({error})")
        yield browser


@pytest.fixture(scope="session")
def site(comfy, browser):
    """The server with models to look at: good.safetensors, full.safetensors (16-bit), corrupt.safetensors."""
    folder = comfy.base / "models" / "diffusion_models" / "browser"
    folder.mkdir()
    shutil.copy(MODEL, folder / "full.safetensors")  # not linked: links out of the model folders are not previewed
    quantize_checkpoint(FileSource(MODEL), folder / "good.safetensors", Settings(recipe="fast"))
    (folder / "corrupt.safetensors").write_bytes(b"no header" * 100)
    for name in ("style", "detail"):
        path = comfy.base / "models" / "loras" / "browser" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(random_lora(0), path)
    comfy.set_settings(SETTINGS)
    yield comfy
    shutil.rmtree(folder)


@pytest.fixture(scope="session", params=[False, True], ids=["canvas", "vue"])
def window(site, browser, request):
    """One page for all tests (it takes seconds to load), and its console's errors on an empty canvas."""
    site.set_settings({VUE_NODES: request.param})
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(1000 * PATIENCE)
    canvas = Canvas(page, site.url)
    page.wait_for_load_state("networkidle")
    assert not any("svdquant" in error.lower() for error in canvas.errors)
    yield canvas, frozenset(canvas.errors)
    page.close()


def wait_until_idle(site):
    """Until the server runs nothing: what one test left running is no burden to the next."""
    end = time.monotonic() + PATIENCE
    while any(site.get("/queue").json().values()):
        site.interrupt()
        assert time.monotonic() < end, "the server does not come to rest"
        time.sleep(0.2)


@pytest.fixture
def canvas(window, site):
    """An empty canvas; at the end there must be no error in its console but the host's own."""
    canvas, known = window
    canvas.page.evaluate("app.graph.clear()")
    canvas.errors.clear()
    yield canvas
    wait_until_idle(site)
    assert not [error for error in canvas.errors if error not in known and "api.comfy.org" not in error]
