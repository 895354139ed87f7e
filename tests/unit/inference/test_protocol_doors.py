"""The settings of the data plane's doors: what reaches it, and what is refused before it starts."""

import sys
from pathlib import Path

import pytest

from agent.config import InferenceSettings, load_settings
from agent.daemon import _data_plane_options
from agent.ports import Trouble
from protocol.settings import BadSettings


def test_nothing_is_opened_unless_it_is_set() -> None:
    options = _data_plane_options(InferenceSettings())
    assert not {"--grpc", "--allow-repository-control"} & set(options)


def test_what_is_set_reaches_the_data_plane() -> None:
    options = _data_plane_options(InferenceSettings(grpc="127.0.0.1:8001", allow_repository_control=True))
    assert "127.0.0.1:8001" == options[options.index("--grpc") + 1]
    assert "--allow-repository-control" in options


def test_a_missing_extra_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "grpc", raising=False)
    with pytest.raises(Trouble, match="gRPC is not installed") as trouble:
        _data_plane_options(InferenceSettings(grpc="127.0.0.1:8001"))
    assert "edgewarden[grpc]" in trouble.value.remedy


@pytest.mark.parametrize("address", ["0.0.0.0:8001", "8001", "device.example:8001", "127.0.0.1:99999"])
def test_only_loopback_addresses_are_taken(tmp_path: Path, address: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'[inference]\ngrpc = "{address}"\n')
    with pytest.raises(BadSettings, match=r"inference\.grpc"):
        load_settings(file)
