"""A real Mosquitto for tests, with TLS and rights as the fleet server sets them, and a wire that can be cut."""

import getpass
import json
import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from device_pki import Authority
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

_PLUGINS = [Path(folder) / "mosquitto_dynamic_security.so" for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib")]
_PLUGINS += sorted(Path("/usr/lib").glob("*/mosquitto_dynamic_security.so"))


def wait_for(what: Callable[[], object], seconds: float = 8.0) -> None:
    """Wait until something is true; fail the test when it does not become so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def acl(kind: str, topic: str) -> dict[str, object]:
    return {"acltype": kind, "topic": topic, "allow": True}


def device_role(device: str, up: str = "#") -> dict[str, object]:
    down = f"ew/1/d/{device}/down/#"
    rights = [acl("publishClientReceive", down), acl("subscribePattern", down)]
    rights += [acl("publishClientSend", f"ew/1/d/{device}/up/{part}") for part in up.split()]
    return {"rolename": f"d-{device}", "acls": rights}


class Broker:
    """Mosquitto on free ports: one for devices, one for the server. ``devices``: id -> what it may publish."""

    def __init__(self, folder: Path, devices: Authority, admins: Authority, rights: dict[str, str]) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._admins, self._devices = admins, devices
        self._probe = admins.client_tls(folder / "probe", "srv", devices.pem)
        certificate, key = devices.server_files(folder)
        (folder / "devices.pem").write_text(devices.pem)
        (folder / "admins.pem").write_text(admins.pem)
        self._write_rights(rights)
        (folder / "mosquitto.conf").write_text(
            f"""
            {"user root" if os.geteuid() == 0 else f"user {getpass.getuser()}"}
            allow_anonymous false
            plugin {next(path for path in _PLUGINS if path.exists())}
            plugin_opt_config_file {folder / "dyn.json"}
            log_dest stderr
            listener {self.port} 127.0.0.1
            cafile {folder / "devices.pem"}
            certfile {certificate}
            keyfile {key}
            require_certificate true
            use_identity_as_username true
            use_username_as_clientid true
            listener {self.admin_port} 127.0.0.1
            cafile {folder / "admins.pem"}
            certfile {certificate}
            keyfile {key}
            require_certificate true
            use_identity_as_username true
            """.replace("            ", "")
        )

    def _write_rights(self, rights: dict[str, str]) -> None:
        state = "ew/1/srv/state"
        common = [acl("publishClientReceive", state), acl("subscribeLiteral", state)]
        everything = [acl(k, "ew/1/#") for k in ("publishClientSend", "publishClientReceive", "subscribePattern")]
        rules = {
            "clients": [
                {"username": "srv", "roles": [{"rolename": "srv"}]},
                *({"username": d, "roles": [{"rolename": "device"}, {"rolename": f"d-{d}"}]} for d in rights),
            ],
            "roles": [
                {"rolename": "device", "acls": common},
                {"rolename": "srv", "acls": everything},
                *(device_role(device, up) for device, up in rights.items()),
            ],
            "groups": [],
            "defaultACLAccess": dict.fromkeys(
                ("publishClientSend", "publishClientReceive", "subscribe", "unsubscribe"), False
            ),
        }
        (self._folder / "dyn.json").write_text(json.dumps(rules))

    def start(self) -> None:
        with (self._folder / "log").open("ab") as log:
            command = ["mosquitto", "-c", str(self._folder / "mosquitto.conf")]
            self._process = subprocess.Popen(command, stderr=log, stdout=log)
        wait_for(self._listens)

    def _listens(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._folder / "log").read_text()
        # Only its main loop answers TLS; before that, Mosquitto 2.0.11 may miss a SIGTERM for good.
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.admin_port), timeout=1) as sock:
            self._probe.wrap_socket(sock, server_hostname="127.0.0.1").close()
            return True
        return False

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(5)
            self._process = None

    def freeze(self, frozen: bool) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP if frozen else signal.SIGCONT)

    def server(self, folder: Path) -> "Server":
        return Server(self.admin_port, self._admins.client_tls(folder, "srv", self._devices.pem))


class Server:
    """The fleet server's side of the broker: hears everything, and may say everything."""

    def __init__(self, port: int, tls: object) -> None:
        self.heard: list[tuple[str, bytes, bool]] = []  # topic, payload, retained
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.tls_set_context(tls)
        self._client.on_message = self._on_message
        self._ready = threading.Event()
        self._client.on_connect = lambda client, *_: client.subscribe("ew/1/#", options=SubscribeOptions(qos=1))
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert self._ready.wait(5)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        self.heard.append((message.topic, message.payload, message.retain))

    def payloads(self, topic: str) -> list[bytes]:
        return [payload for heard, payload, _ in self.heard if heard == topic]

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(5)

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Wire:
    """A TCP connection that can be cut: forwards a port of its own to another."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._open = True
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            with self._lock:
                self._pairs.append((near, far))
                if not self._open:
                    self._hang_up()
                    continue
            self._threads.append(threading.Thread(target=self._forward, args=(near, far)))
            self._threads[-1].start()

    def _forward(self, near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as ready, suppress(OSError, ValueError):
            ready.register(near, selectors.EVENT_READ, far)
            ready.register(far, selectors.EVENT_READ, near)
            while True:
                for key, _ in ready.select():
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]  # registered above as sockets
                    if not data:
                        self._end(near, far)
                        return
                    key.data.sendall(data)

    def _end(self, *pair: socket.socket) -> None:
        for sock in pair:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _hang_up(self) -> None:
        for pair in self._pairs:
            for sock in pair:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        with self._lock:
            self._open = False
            self._hang_up()

    def mend(self) -> None:
        with self._lock:
            self._open = True

    def close(self) -> None:
        self.cut()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()
        for pair in self._pairs:
            self._end(*pair)
