"""A stream of real handwritten digits against one device's inference socket, with the truth told afterwards.

An ordinary local client: Open Inference Protocol over a unix socket, binary tensors, standard library. It counts what
it sent and what came back, so that the demo can compare that with what the fleet server says.
"""

import http.client
import json
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from protocol.manifest import TensorSpec, decode_manifest

ANSWER_SECONDS = 10.0


@dataclass
class Counts:
    """What one stream did so far."""

    sent: int = 0
    answered: int = 0
    failed: int = 0
    right: int = 0
    last_error: str = ""


class UnixConnection(http.client.HTTPConnection):
    """HTTP/1.1 over a unix socket."""

    def __init__(self, path: Path) -> None:
        """``path``: the socket file."""
        super().__init__("localhost", timeout=ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket file."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class DigitStream:
    """Sends held-out digits at a steady rate until stopped."""

    def __init__(self, unix: Path, heldout: Path, spec: TensorSpec, *, per_second: float, start_at: int) -> None:
        """``heldout``: ``.npz`` with ``images`` (uint8 0..16, n×8×8×1) and ``truth``."""
        with np.load(heldout, allow_pickle=False) as data:
            self._images: NDArray[np.uint8] = data["images"]
            self._truth: NDArray[np.uint8] = data["truth"]
        self._unix = unix
        self._pause = 1.0 / per_second
        self._next = start_at % len(self._images)
        self._spec = spec
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"stream {unix.parent.name}", daemon=True)
        self.counts = Counts()

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait for the answer in flight."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=2 * ANSWER_SECONDS)

    def _run(self) -> None:
        connection = UnixConnection(self._unix)
        while not self._stopping.wait(self._pause):
            try:
                self._ask_one(connection)
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.counts.failed += 1
                self.counts.last_error = f"{time.strftime('%H:%M:%S')} {error!r}"
                connection.close()
        connection.close()

    def _ask_one(self, connection: UnixConnection) -> None:
        k, self._next = self._next, (self._next + 1) % len(self._images)
        self.counts.sent += 1
        request_id, predicted = self._infer(connection, self._images[k])
        self.counts.answered += 1
        self.counts.right += int(predicted == self._truth[k])
        body = json.dumps({"id": request_id, "truth": int(self._truth[k])})
        _post(connection, "/v2/models/digits/feedback", body.encode(), {"Content-Type": "application/json"})

    def _infer(self, connection: UnixConnection, image: NDArray[np.uint8]) -> tuple[str, int]:
        tensor = quantise_pixels(image, self._spec)
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": self._spec.name,
                        "shape": [1, 8, 8, 1],
                        "datatype": self._spec.dtype,
                        "parameters": {"binary_data_size": len(tensor)},
                    }
                ]
            }
        ).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
        answer = json.loads(_post(connection, "/v2/models/digits/infer", head + tensor, headers))
        return str(answer["id"]), int(np.argmax(answer["outputs"][0]["data"]))


def quantise_pixels(image: NDArray[np.uint8], spec: TensorSpec) -> bytes:
    """Return one image (values 0..16) as the model's INT8 input: q = round(pixel / 16 / scale) + zero point."""
    scale, zero = spec.scale or 1.0, spec.zero_point or 0
    quantised = np.rint(image.astype(np.float32) / 16.0 / scale) + zero
    tensor: bytes = np.clip(quantised, -128, 127).astype(np.int8).tobytes()
    return tensor


def input_of(manifest: Path) -> TensorSpec:
    """Return the first input of a bundle folder's manifest."""
    return decode_manifest(manifest.read_bytes()).inputs[0]


def _post(connection: UnixConnection, path: str, body: bytes, headers: dict[str, str]) -> bytes:
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    data: bytes = response.read()
    if response.status != http.client.OK:
        raise ValueError(f"{path}: HTTP {response.status} {data[:200]!r}")
    return data
