"""The managed broker's life: started, killed, damaged, in the way, missing."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_world import BrokerWorld, eventually

from fleet_server.adapters.mosquitto import (
    BrokerFailed,
    BrokerMissing,
    BrokerSettings,
    Installation,
    ManagedBroker,
    PortTaken,
    configuration,
    find_mosquitto,
)
from protocol.topics import Channel, device_topic

pytestmark = pytest.mark.broker


@pytest.fixture
def world(tmp_path: Path) -> Iterator[BrokerWorld]:
    world = BrokerWorld(tmp_path, "a")
    yield world
    world.broker.stop()


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_a_killed_broker_is_started_again(world: BrokerWorld) -> None:
    world.broker.start()
    first = world.broker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: world.broker.pid not in (None, first))

    def connects() -> bool:
        try:
            with world.device("a") as device:
                return device.publish(device_topic("a", Channel.EVENT)) != "Not authorized"
        except OSError:
            return False

    assert eventually(connects)
    assert world.broker.restarts == 1


def test_stopping_ends_the_broker(world: BrokerWorld) -> None:
    world.broker.start()
    pid = world.broker.pid
    world.broker.stop()
    assert pid is not None
    assert gone(pid)
    assert world.broker.pid is None


def test_a_damaged_database_is_moved_aside(world: BrokerWorld) -> None:
    world.settings.folder.mkdir()
    (world.settings.folder / "mosquitto.db").write_bytes(b"this is no database of a broker")
    world.broker.start()
    aside = list(world.settings.folder.glob("mosquitto.db.damaged-*"))
    assert [path.read_bytes() for path in aside] == [b"this is no database of a broker"]


def test_what_is_retained_survives_a_restart(world: BrokerWorld) -> None:
    world.broker.start()
    with world.device("a") as device:
        device.publish(device_topic("a", Channel.STATE), b"here", retain=True)
    world.broker.stop()
    world.broker = ManagedBroker(world.settings, lambda: world.known)
    world.broker.start()
    states: list[bytes] = []
    link = world.link(on_message=lambda topic, payload, acknowledge: states.append(payload) or True)
    link.start()
    try:
        assert eventually(lambda: states == [b"here"])
    finally:
        link.stop()


@pytest.mark.parametrize("which", ["device_port", "admin_port"])
def test_a_taken_port_is_named(world: BrokerWorld, which: str) -> None:
    port = getattr(world.settings, which)
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(PortTaken, match=f"port {port} on 127.0.0.1 is taken"),
    ):
        world.broker.start()


def test_a_broker_that_does_not_come_up_says_why(world: BrokerWorld) -> None:
    world.settings.device_tls.certificate.write_text("no certificate")
    with pytest.raises(BrokerFailed, match="Unable to load server certificate"):
        world.broker.start(timeout=1.0)


def test_a_machine_without_mosquitto_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(BrokerMissing, match=r"install it with: .*mosquitto"):
        find_mosquitto(path=str(tmp_path))
    with pytest.raises(BrokerMissing, match=r"mosquitto_dynamic_security\.so"):
        find_mosquitto(libraries=(str(tmp_path),))


def test_the_broker_dies_with_its_server(world: BrokerWorld) -> None:
    program = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from broker_world import BrokerWorld
        world = BrokerWorld(Path(sys.argv[1]), "a")
        world.broker.start()
        print(world.broker.pid, flush=True)
        time.sleep(60)
    """)
    folder = world.folder / "child"
    folder.mkdir()
    command = [sys.executable, "-c", program, str(folder), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert not gone(pid)
        server.kill()
    assert eventually(lambda: gone(pid))


def test_the_configuration_never_lets_anybody_in_by_default(world: BrokerWorld) -> None:
    installation = Installation(program=Path("/usr/sbin/mosquitto"), plugin=Path("/lib/x.so"))
    text = configuration(world.settings, installation)
    device, admin = text.split("listener ")[1:]
    assert "allow_anonymous false" in text
    assert "acl_file" not in text
    for listener in (device, admin):
        assert {"require_certificate true", "use_identity_as_username true"} <= set(listener.splitlines())
    assert "use_username_as_clientid true" in device
    assert "use_username_as_clientid" not in admin
    assert admin.startswith(f"{world.settings.admin_port} 127.0.0.1\n")


def test_settings_listen_on_all_addresses_unless_told_otherwise(world: BrokerWorld) -> None:
    everywhere = BrokerSettings(
        folder=world.folder, device_tls=world.settings.device_tls, admin_tls=world.settings.admin_tls
    )
    text = configuration(everywhere, Installation(program=Path("m"), plugin=Path("p")))
    assert "listener 8883\n" in text
