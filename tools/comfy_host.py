"""A real ComfyUI as an object: start it, queue graphs, look at what comes back.

    graph = Graph()
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0xFF0000)
    graph.add("SaveImage", images=image[0], filename_prefix="red")

    with ComfyHost(packs={"ComfyUI-SVDQuant": repository}) as host:
        [picture] = host.run(graph).images()

The server is a subprocess on a free loopback port, with a base directory of its own: models, custom
nodes, inputs and outputs are this object's, and the ComfyUI that runs stays as it is.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import requests
import websocket
from PIL import Image

from tools.bootstrap import comfyui_path

LAUNCHER = Path(__file__).with_name("comfy_launch.py")
FOLDERS = ("models", "custom_nodes", "input", "output", "temp", "user")
MEMORY_MODES = {"--cpu", "--gpu-only", "--highvram", "--normalvram", "--lowvram", "--novram"}
# What a pack's folder holds beside the pack, where it has to be copied.
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")


class HostError(RuntimeError):
    """The server is missing, did not start, died, or answered with an error."""


class GraphError(RuntimeError):
    """A graph was refused, or a node of it raised."""

    def __init__(
        self,
        exception_message: str,
        *,
        exception_type: str,
        node_id: str | None = None,
        node_type: str | None = None,
        traceback: str = "",
        node_errors: Mapping[str, Any] | None = None,
    ) -> None:
        where = f"node {node_id} ({node_type}): " if node_id else ""
        super().__init__(f"{where}{exception_type}: {exception_message}\n{traceback}".rstrip())
        self.exception_message = exception_message
        self.exception_type = exception_type
        self.node_id = node_id
        self.node_type = node_type
        self.traceback = traceback
        self.node_errors = dict(node_errors or {})  # what validation found, by node


class GraphInterrupted(GraphError):
    """A graph was stopped at a user's request."""


class Node:
    """A node of a graph under construction; `node[i]` links to its output i."""

    def __init__(self, node_id: str) -> None:
        self.id = node_id

    def __getitem__(self, output: int) -> list[str | int]:
        return [self.id, output]

    def __str__(self) -> str:
        return self.id


class Graph:
    """Builds a graph in the format of ComfyUI's API."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, class_type: str, /, **inputs: Any) -> Node:
        """Add a node; an input is a value, or a link such as `other[0]`."""
        node = Node(str(len(self.nodes) + 1))
        self.nodes[node.id] = {"class_type": class_type, "inputs": inputs}
        return node

    def to_api(self) -> dict[str, dict[str, Any]]:
        """The graph as the server wants it."""
        return self.nodes


class Progress(NamedTuple):
    """A step of a node's progress bar."""

    node: str
    value: int
    max: int


@dataclass
class Result:
    """What a graph did."""

    host: ComfyHost
    prompt_id: str
    seconds: float = 0.0
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by node: what it showed
    executed: list[str] = field(default_factory=list)  # nodes, in order
    cached: list[str] = field(default_factory=list)  # nodes that needed no run
    progress: list[Progress] = field(default_factory=list)
    status: str = ""

    def images(self, node: Node | str | None = None) -> list[Image.Image]:
        """The images that a node saved or previewed; without a node, those of all."""
        shown = [self.outputs.get(str(node), {})] if node else self.outputs.values()
        files = [file for output in shown for file in output.get("images", [])]
        return [Image.open(io.BytesIO(self.host.view(file))) for file in files]


class ComfyHost:
    """A ComfyUI server and its client.

    base: the server's folder, kept at the end; by default a temporary one.
    packs: node packs to link into custom_nodes, by the name they get there.
    models: files to link into models, by kind ("diffusion_models", "loras", ...).
    options: more of ComfyUI's command line; `--cpu` is there unless they choose a memory mode.
    """

    def __init__(
        self,
        base: Path | None = None,
        *,
        packs: Mapping[str, Path] | None = None,
        models: Mapping[str, Iterable[Path]] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self.comfyui = comfyui_path()
        if not (self.comfyui / "main.py").is_file():
            raise HostError(
                f"There is no ComfyUI in {self.comfyui}. `python tools/bootstrap.py` fetches one "
                "(`make test` and `make demo` begin with it); COMFYUI_PATH names one of your own."
            )
        self.options = [*options] if MEMORY_MODES & set(options) else ["--cpu", *options]
        self.temporary = base is None
        self.base = Path(tempfile.mkdtemp(prefix="comfyui-")) if base is None else base.resolve()
        self.log = self.base / "comfyui.log"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.http = requests.Session()
        self.http.trust_env = False  # no proxy stands between this process and its own server
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, pack in (packs or {}).items():
            self.add_pack(name, pack)
        for kind, files in (models or {}).items():
            for file in files:
                self.add_model(kind, file)

    # The server

    def add_pack(self, name: str, folder: Path) -> None:
        """Link a node pack into custom_nodes, or copy it where links need a privilege."""
        _link(folder, self.base / "custom_nodes" / name)

    def add_model(self, kind: str, file: Path) -> None:
        """Link a file into models/<kind>, or copy it; a running server finds it there."""
        _link(file, self.base / "models" / kind / file.name)

    def start(self, timeout: float = 180.0) -> None:
        """Start the server and wait until it answers."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            *(sys.executable, str(LAUNCHER), str(self.comfyui)),
            *("--base-directory", str(self.base)),
            *("--database-url", "sqlite:///:memory:"),
            *("--port", str(self.port)),
            *("--disable-auto-launch", "--disable-api-nodes"),
            *self.options,
        ]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                self.http.get(f"{self.url}/system_stats", timeout=5).raise_for_status()
                return
            if self.process.poll() is not None:
                raise self._failure(f"ComfyUI ended with exit code {self.process.returncode}")
            if time.monotonic() > deadline:
                self.stop()
                raise self._failure(f"ComfyUI did not answer within {timeout:.0f} s")
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server; its base directory stays."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None

    def restart(self) -> None:
        """End the server and start it again, on the same base directory."""
        self.stop()
        self.start()

    def __enter__(self) -> ComfyHost:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self.http.close()
        if self.temporary:
            shutil.rmtree(self.base, ignore_errors=True)

    # The client

    @property
    def url(self) -> str:
        """Where the server listens; a browser can look in, too."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **parameters: Any) -> requests.Response:
        """GET any of the server's paths."""
        return self._request("GET", path, params=parameters)

    def object_info(self) -> dict[str, dict[str, Any]]:
        """Every node type that the server knows, with its inputs and outputs."""
        return self.get("/object_info").json()

    def history(self, prompt_id: str) -> dict[str, Any]:
        """What the server remembers of a finished graph; empty before that."""
        return self.get(f"/history/{prompt_id}").json().get(prompt_id, {})

    def view(self, file: Mapping[str, str]) -> bytes:
        """The contents of a file as a node's output names it."""
        names = ("filename", "subfolder", "type")
        return self.get("/view", **{name: file[name] for name in names}).content

    def upload_image(self, image: Image.Image, name: str) -> str:
        """Put an image into the server's input folder; the result is its name for LoadImage."""
        data = io.BytesIO()
        image.save(data, "PNG")
        files = {"image": (name, data.getvalue(), "image/png")}
        return self._request("POST", "/upload/image", files=files, data={"overwrite": "true"}).json()["name"]

    def set_settings(self, settings: Mapping[str, Any]) -> None:
        """Change settings of the browser's page."""
        self._request("POST", "/settings", json=dict(settings))

    def interrupt(self) -> None:
        """Stop the graph that runs now."""
        self._request("POST", "/interrupt")

    def free(self, *, unload_models: bool = True, free_memory: bool = True) -> None:
        """Ask the server to unload its models and to forget cached outputs, once it is idle."""
        flags = {"unload_models": unload_models, "free_memory": free_memory}
        self._request("POST", "/free", json=flags)

    def queue(self, graph: Graph | Mapping[str, Any], client_id: str = "") -> str:
        """Hand a graph to the server without waiting for it; the result is its prompt id."""
        prompt = graph.to_api() if isinstance(graph, Graph) else dict(graph)
        response = self._request("POST", "/prompt", json={"prompt": prompt, "client_id": client_id}, accept=(200, 400))
        answer = response.json()
        if answer.get("error") or answer.get("node_errors"):  # the latter alone: refused in part
            raise _refusal(answer)
        return answer["prompt_id"]

    def run(
        self,
        graph: Graph | Mapping[str, Any],
        on_progress: Callable[[Progress], None] | None = None,
        timeout: float = 600.0,
    ) -> Result:
        """Run a graph to its end.

        Raises GraphError when it is refused or fails, and GraphInterrupted when it is stopped.
        """
        client_id = uuid.uuid4().hex
        started = time.monotonic()
        address = f"{self.url.replace('http', 'ws')}/ws?clientId={client_id}"
        try:
            connection = websocket.create_connection(address, timeout=10)
        except OSError as error:
            raise self._failure("ComfyUI does not answer") from error
        with contextlib.closing(connection):
            result = Result(self, self.queue(graph, client_id))
            try:
                self._follow(connection, result, on_progress, started + timeout)
            except websocket.WebSocketTimeoutException:
                self.interrupt()
                raise HostError(f"The graph was not done after {timeout:.0f} s.") from None
            except (websocket.WebSocketException, OSError) as error:
                raise self._failure("ComfyUI died over a graph") from error
            except KeyboardInterrupt:
                self.interrupt()
                raise
        record = self.history(result.prompt_id)
        result.seconds = time.monotonic() - started
        result.outputs = record["outputs"]
        result.status = record["status"]["status_str"]
        return result

    def _follow(
        self,
        connection: websocket.WebSocket,
        result: Result,
        on_progress: Callable[[Progress], None] | None,
        deadline: float,
    ) -> None:
        """Read the server's messages until the graph is over."""
        failure: GraphError | None = None
        while True:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            message = connection.recv()
            if message == "":
                raise websocket.WebSocketConnectionClosedException
            if isinstance(message, bytes):  # a preview image
                continue
            event = json.loads(message)
            data = event["data"]
            if data.get("prompt_id") != result.prompt_id:
                continue
            match event["type"]:
                case "execution_cached":
                    result.cached = data["nodes"]
                case "executing" if data["node"] is None:  # over, and in the history
                    if failure:
                        raise failure
                    return
                case "executing":
                    result.executed.append(data["node"])
                case "progress":
                    step = Progress(data["node"], data["value"], data["max"])
                    result.progress.append(step)
                    if on_progress:
                        on_progress(step)
                case "execution_error":
                    failure = GraphError(
                        data["exception_message"].strip(),
                        exception_type=data["exception_type"],
                        node_id=data["node_id"],
                        node_type=data["node_type"],
                        traceback="".join(data["traceback"]),
                    )
                case "execution_interrupted":
                    failure = GraphInterrupted(
                        "the graph was interrupted",
                        exception_type="InterruptProcessingException",
                        node_id=data["node_id"],
                        node_type=data["node_type"],
                    )

    def _request(
        self, method: str, path: str, *, accept: Sequence[int] = (200,), **arguments: Any
    ) -> requests.Response:
        try:
            response = self.http.request(method, self.url + path, timeout=60, **arguments)
        except requests.RequestException as error:
            raise self._failure(f"ComfyUI does not answer {method} {path}") from error
        if response.status_code not in accept:
            answer = f"{response.status_code} {response.text[:500]}"
            raise HostError(f"ComfyUI answers {method} {path} with {answer}")
        return response

    def _failure(self, reason: str) -> HostError:
        """An error that shows the end of the server's log."""
        lines = self.log.read_text("utf-8", "replace").splitlines() if self.log.exists() else []
        return HostError("\n".join([f"{reason}. The end of its log:", *lines[-40:]]))


def _link(source: Path, target: Path) -> None:
    """Make target a link to source, or a copy of it, in the place of an earlier one."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(source.resolve(), target_is_directory=source.is_dir())
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=NOT_COPIED)
        else:
            shutil.copy2(source, target)


def _refusal(answer: Mapping[str, Any]) -> GraphError:
    """The error for a graph that did not pass the server's validation."""
    node_errors = answer.get("node_errors") or {}
    refused = answer.get("error") or {"type": "invalid_node", "message": "Some outputs are refused"}
    details = [
        f"node {node_id} ({node['class_type']}): {error['message']}: {error['details']}"
        for node_id, node in node_errors.items()
        for error in node["errors"]
    ]
    first, node = next(iter(node_errors.items()), (None, {}))
    return GraphError(
        "; ".join([refused["message"], *details]),
        exception_type=refused["type"],
        node_id=first,
        node_type=node.get("class_type"),
        node_errors=node_errors,
    )
