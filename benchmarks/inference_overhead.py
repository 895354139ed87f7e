"""Measures what serving adds to a bare invoke, and how MLServer does on the same model.

Everything asks the same .tflite with one interpreter of one thread. A bare invoke copies in, invokes and copies out
in this process. Clients and server share the machine, as an application and the agent do. The floor is a server of
ten lines that reads so many bytes, invokes, and sends the output: what is above it is ours, what is below is not.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tritonclient.http
from parts import (
    DIGITS,
    ROOT,
    RUNTIMES,
    Client,
    environment,
    free_port,
    need_mobilenet,
    note,
    options,
    ratio,
    result,
    serving,
    side_by_side,
    until,
)

from runtime.interpreter import open_model

PEER = ROOT / "build" / "mlserver-venv"
PEER_NEEDS = ("mlserver==1.7.1", "ai-edge-litert>=2.0")
Act = Callable[[], object]


def main() -> None:
    """Answer the question."""
    given = options(__doc__ or "", 7, with_mlserver="install MLServer into build/mlserver-venv, and ask it too")
    rounds, factor = (2, 10) if given.quick else (given.rounds, 1)
    figures: dict[str, object] = {}
    for runtime in RUNTIMES:
        figures[f"mobilenet_v2 {runtime}"] = against_bare_invoke(need_mobilenet(), runtime, rounds, 100 // factor)
    figures["digits litert"] = against_echo(rounds, 2000 // factor)
    if given.with_mlserver:
        install_peer()
        figures["digits mlserver"] = against_mlserver(DIGITS / "model.tflite", rounds, 300 // factor)
        figures["mobilenet_v2 mlserver"] = against_mlserver(need_mobilenet(), rounds, 30 // min(factor, 3))
    result("inference_overhead", **figures)


# ---------------------------------------------------------------- against a bare invoke
def against_bare_invoke(path: Path, runtime: str, rounds: int, times: int) -> dict[str, object]:
    """Return p50 of our client and of Triton's over p50 of a bare invoke."""
    note(f"{path.name} on {runtime}, against a bare invoke")
    with serving(path, runtime) as server, contextlib.ExitStack() as clients:
        invoke, image = bare(path, runtime)
        request = raw_request(path.stem, image)
        floor_path, _ = clients.enter_context(alone(FLOOR, str(path), runtime, str(image.nbytes), str(len(request))))
        raw, floor = connected(clients, server.unix), connected(clients, floor_path)
        ours = clients.enter_context(contextlib.closing(Client(server.unix)))
        acts: dict[str, Act] = {
            "bare invoke": invoke,
            "floor": lambda: exchange(floor, request),
            "raw socket": lambda: exchange(raw, request),
            "our client, unix socket": lambda: ours.infer(path.stem, image),
            "tritonclient, TCP": clients.enter_context(triton(server.http, path.stem, image)),
        }
        took = side_by_side(acts, rounds=rounds, times=times)
    return {
        "p50_us": took,
        "floor_over_bare": ratio(took["floor"], took["bare invoke"]),
        "raw_over_floor": ratio(took["raw socket"], took["floor"]),
        "unix_over_bare": ratio(took["our client, unix socket"], took["bare invoke"]),
        "tritonclient_over_bare": ratio(took["tritonclient, TCP"], took["bare invoke"]),
    }


def bare(path: Path, runtime: str) -> tuple[Act, np.ndarray]:
    """Return a bare invoke, and the image it is made with."""
    model = open_model(path, runtime=runtime)
    image = np.random.default_rng(0).integers(-128, 128, model.inputs[0].shape).astype(np.int8)

    def invoke() -> object:
        model.fill(0, image.data.cast("B"))
        model.invoke()
        return model.array(0)

    return invoke, image


@contextlib.contextmanager
def triton(address: str, model: str, image: np.ndarray, *, binary: bool = True) -> Iterator[Act]:
    """Yield a request by the stock client."""
    with tritonclient.http.InferenceServerClient(address) as client:
        spec = client.get_model_metadata(model)["inputs"][0]
        tensor = tritonclient.http.InferInput(spec["name"], list(image.shape), spec["datatype"])
        tensor.set_data_from_numpy(image, binary_data=binary)
        outputs = None
        if not binary:
            name = client.get_model_metadata(model)["outputs"][0]["name"]
            outputs = [tritonclient.http.InferRequestedOutput(name, binary_data=False)]
        yield lambda: client.infer(model, [tensor], outputs=outputs)


# ---------------------------------------------------------------- against an echo
def against_echo(rounds: int, times: int) -> dict[str, object]:
    """Return p50 of a digits request over p50 of the same bytes through a bare echo, both on a unix socket.

    Client and servers are kept on cores of their own: where the kernel puts them would decide more than they do, for
    waking another core takes longer than an echo.
    """
    note("digits on litert, against an echo of the same bytes")
    image = np.zeros((1, 8, 8, 1), np.int8)
    request = raw_request("digits", image)
    model = str(DIGITS / "model.tflite")
    with serving(DIGITS, "litert") as server, contextlib.ExitStack() as open_:
        path, echo_pid = open_.enter_context(alone(ECHO))
        floor_path, floor_pid = open_.enter_context(alone(FLOOR, model, "litert", "64", str(len(request))))
        raw, echo, floor = (connected(open_, one) for one in (server.unix, path, floor_path))
        open_.enter_context(apart(server.pid, echo_pid, floor_pid))
        ours = open_.enter_context(contextlib.closing(Client(server.unix)))
        invoke, _ = bare(DIGITS / "model.tflite", "litert")
        acts: dict[str, Act] = {
            "bare invoke": invoke,
            "echo": lambda: exchange(echo, request),
            "floor": lambda: exchange(floor, request),
            "raw socket": lambda: exchange(raw, request),
            "our client": lambda: ours.infer("digits", image),
        }
        took = side_by_side(acts, rounds=rounds, times=times)
    return {
        "p50_us": took,
        "floor_over_echo": ratio(took["floor"], took["echo"]),
        "raw_over_floor": ratio(took["raw socket"], took["floor"]),
        "raw_over_echo": ratio(took["raw socket"], took["echo"]),
        "client_over_echo": ratio(took["our client"], took["echo"]),
    }


def raw_request(model: str, image: np.ndarray) -> bytes:
    """Return the shortest request: the body is the input and nothing else."""
    head = (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: localhost\r\nInference-Header-Content-Length: 0\r\n"
        f"Content-Length: {image.nbytes}\r\n\r\n"
    )
    return head.encode() + image.tobytes()


def connected(open_: contextlib.ExitStack, path: str) -> socket.socket:
    """Return a connection that ends with the stack."""
    sock = open_.enter_context(socket.socket(socket.AF_UNIX))
    sock.connect(path)
    return sock


def exchange(sock: socket.socket, request: bytes) -> bytes:
    """Send a request, return what comes back: small answers come in one piece."""
    sock.sendall(request)
    return sock.recv(65536)


ECHO = """
import socket, sys
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    sock, _ = listener.accept()
    while data := sock.recv(65536):
        sock.sendall(data)
"""


@contextlib.contextmanager
def apart(*servers: int) -> Iterator[None]:
    """Keep this process on the first core and the servers' processes on the last; one core has to do for all."""
    cores = os.sched_getaffinity(0)
    tasks = [int(task.name) for pid in servers for task in Path(f"/proc/{pid}/task").iterdir()]
    for task in tasks:
        os.sched_setaffinity(task, {max(cores)})
    os.sched_setaffinity(0, {min(cores)})
    yield
    os.sched_setaffinity(0, cores)


FLOOR = """
import socket, sys
from runtime.interpreter import open_model
model = open_model(sys.argv[2], runtime=sys.argv[3])
size, whole = int(sys.argv[4]), int(sys.argv[5])
view = memoryview(bytearray(whole))
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    sock, _ = listener.accept()
    while True:
        got = 0
        while got < whole:
            if not (more := sock.recv_into(view[got:])):
                sys.exit()
            got += more
        model.fill(0, view[whole - size :])
        model.invoke()
        sock.sendall(model.read(0))
"""


@contextlib.contextmanager
def alone(program: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Run a server of a few lines in a process of its own; yield its path and its process."""
    with TemporaryDirectory(prefix="edgewarden-bench-") as folder:
        path = Path(folder) / "alone.sock"
        command = [sys.executable, "-c", program, str(path), *arguments]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
            until(path.is_socket, process)
            yield str(path), process.pid
            process.terminate()


# ---------------------------------------------------------------- against MLServer
def install_peer() -> None:
    """Make MLServer's own environment, once."""
    python = PEER / "bin" / "python"
    if not (PEER / "bin" / "mlserver").exists():
        note(f"installing {', '.join(PEER_NEEDS)} into {PEER}")
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEER_NEEDS], check=True)


def against_mlserver(path: Path, rounds: int, times: int) -> dict[str, object]:
    """Return p50 of MLServer over ours: the same client, the same model, JSON because MLServer takes nothing else."""
    name = "digits" if path.parent == DIGITS else path.stem
    note(f"{name} on litert, against MLServer")
    with serving(DIGITS if name == "digits" else path, "litert") as server, mlserver(path, name) as peer:
        image = np.random.default_rng(0).integers(-128, 128, open_model(path).inputs[0].shape).astype(np.int8)
        with (
            triton(server.http, name, image) as ours_binary,
            triton(server.http, name, image, binary=False) as ours_json,
            triton(peer, name, image, binary=False) as theirs,
        ):
            acts: dict[str, Act] = {"binary": ours_binary, "JSON": ours_json, "MLServer, JSON": theirs}
            took = side_by_side(acts, rounds=rounds, times=times)
    return {
        "p50_us": took,
        "mlserver_over_json": ratio(took["MLServer, JSON"], took["JSON"]),
        "mlserver_over_binary": ratio(took["MLServer, JSON"], took["binary"]),
    }


PEER_RUNTIME = '''
from ai_edge_litert.interpreter import Interpreter
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse, MetadataTensor


class TFLite(MLModel):
    """Serves a .tflite the way MLServer's guide to custom runtimes shows."""

    async def load(self):
        self.interpreter = Interpreter(model_path=self.settings.parameters.uri, num_threads=1)
        self.interpreter.allocate_tensors()
        self.input = self.interpreter.get_input_details()[0]
        self.output = self.interpreter.get_output_details()[0]
        self.inputs = [MetadataTensor(name="x", datatype="INT8", shape=self.input["shape"].tolist())]
        self.outputs = [MetadataTensor(name="y", datatype="INT8", shape=self.output["shape"].tolist())]
        return True

    async def predict(self, payload):
        self.interpreter.set_tensor(self.input["index"], NumpyCodec.decode_input(payload.inputs[0]))
        self.interpreter.invoke()
        scores = self.interpreter.get_tensor(self.output["index"])
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", scores)])
'''


@contextlib.contextmanager
def mlserver(path: Path, name: str) -> Iterator[str]:
    """Run MLServer on a model until the block ends; yield its address."""
    ports: dict[str, Any] = {"http_port": free_port(), "grpc_port": free_port(), "metrics_port": free_port()}
    settings = {**ports, "host": "127.0.0.1", "parallel_workers": 0, "debug": False, "metrics_dir": "."}
    model = {"name": name, "implementation": "tflite_model.TFLite", "parameters": {"uri": str(path)}}
    with TemporaryDirectory(prefix="edgewarden-bench-") as folder:
        (Path(folder) / "tflite_model.py").write_text(PEER_RUNTIME)
        (Path(folder) / "settings.json").write_text(json.dumps(settings))
        (Path(folder) / "model-settings.json").write_text(json.dumps(model))
        with subprocess.Popen(
            [str(PEER / "bin" / "mlserver"), "start", folder],
            cwd=folder,
            env={**environment(), "PYTHONPATH": folder, "PATH": f"{PEER / 'bin'}{os.pathsep}{os.environ['PATH']}"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            address = f"127.0.0.1:{ports['http_port']}"
            with Client(address) as client:
                until(lambda: client.ready(name), process)
            yield address
            process.terminate()


if __name__ == "__main__":
    main()
