"""Settings: strict, with the key and the line that are wrong; flags over the file over defaults."""

import subprocess
import sys
from pathlib import Path

import pytest

from fleet_server.config import Address, BadConfig, Settings, parse, read_file, settle

BAD = {
    "an unknown key": ('data = "/d"\n\ndatas = 1\n', "f.toml:3: unknown key 'datas'; known here: data"),
    "a wrong type": ('data = "/d"\nretention_days = "many"\n', "f.toml:2: retention_days: Expected `int"),
    "not TOML": ("data = \n", "f.toml:1: not TOML: Invalid value"),
    "a table": ("[console]\nport = 1\n", "f.toml:1: console: Expected `str"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_refused_with_key_and_line(text: str, message: str) -> None:
    with pytest.raises(BadConfig) as refused:
        parse(text, "f.toml")
    assert str(refused.value).startswith(message)


BAD_VALUES = {
    "no data folder": (Settings(), "data: which folder"),
    "an address without port": (Settings(data="/d", console="localhost"), "console: 'localhost' is not an address"),
    "a port that cannot be": (Settings(data="/d", broker="0.0.0.0:70000"), "broker: 70000 is not between"),
    "half a certificate": (Settings(data="/d", console_key="k"), "console_certificate and console_key"),
    "a host with a path": (Settings(data="/d", public_hosts=("http://x",)), "public_hosts: 'http://x'"),
    "no retention": (Settings(data="/d", retention_days=0), "retention_days: 0 is not between"),
}


@pytest.mark.parametrize(("settings", "message"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_bad_value_is_refused_with_its_key(settings: Settings, message: str) -> None:
    with pytest.raises(BadConfig) as refused:
        settle(settings, Settings())
    assert str(refused.value).startswith(message)


def test_flags_stand_over_the_file_and_the_file_over_defaults() -> None:
    file = Settings(data="/file", console="127.0.0.1:1", retention_days=7)
    config = settle(file, Settings(console="127.0.0.1:2", host="192.0.2.1", public_hosts=("fleet.example",)))
    assert (str(config.data), config.console.port, config.retention_days) == ("/file", 2, 7)
    assert config.devices == Address(host="192.0.2.1", port=8443)
    assert config.broker == Address(host="192.0.2.1", port=8883)
    assert config.database == "sqlite:////file/edgewarden.db"
    assert config.public_hosts == ("fleet.example",)


def test_an_address_may_be_ipv6() -> None:
    config = settle(Settings(data="/d", console="[::1]:8080"), Settings())
    assert (config.console, str(config.console)) == (Address(host="::1", port=8080), "[::1]:8080")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="cannot read"):
        read_file(tmp_path / "none.toml")


def test_a_configuration_error_ends_with_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('data = "/d"\nsurprise = true\n')
    command = [sys.executable, "-m", "fleet_server", "serve", "--config", str(tmp_path / "server.toml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, "server.toml:2: unknown key 'surprise'" in ended.stderr) == (2, True)


def test_a_second_server_on_the_same_data_folder_is_refused(tmp_path: Path) -> None:
    from fleet_server.adapters.data_lock import DataInUse, DataLock

    lock = DataLock(tmp_path)
    with pytest.raises(DataInUse, match="another edgewarden-server runs on"):
        DataLock(tmp_path)
    lock.release()
    DataLock(tmp_path).release()


def test_a_console_certificate_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    from fleet_server.web.serving import CannotListen, Tls

    (tmp_path / "bad.pem").write_text("no certificate")
    for certificate in ("bad.pem", "absent.pem"):
        with pytest.raises(CannotListen, match=certificate):
            Tls(certificate=tmp_path / certificate, key=tmp_path / "bad.pem").check()
