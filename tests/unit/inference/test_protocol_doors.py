"""The settings of the data plane's doors: what reaches it, and what is refused before it starts."""

import sys
from pathlib import Path

import pytest
from inference_parts import engine, servable

from agent.config import InferenceSettings, load_settings
from agent.daemon import data_plane_options
from agent.inference.parsing import Head, HttpError
from agent.inference.routes import Routes
from agent.ports import Trouble
from protocol.settings import BadSettings


def test_nothing_is_opened_unless_it_is_set() -> None:
    options = data_plane_options(InferenceSettings(), "info")
    assert not {"--grpc", "--allow-repository-control"} & set(options)


def test_what_is_set_reaches_the_data_plane() -> None:
    options = data_plane_options(InferenceSettings(grpc="127.0.0.1:8001", allow_repository_control=True), "info")
    assert "127.0.0.1:8001" == options[options.index("--grpc") + 1]
    assert "--allow-repository-control" in options


@pytest.mark.parametrize(
    ("managed", "switch"), [(True, r"\[inference\] feedback_on_tcp is set"), (False, "--feedback-on-tcp is given")]
)
def test_who_may_not_tell_the_truth_over_tcp_reads_what_would_allow_it(
    tmp_path: Path, managed: bool, switch: str
) -> None:
    serving = engine()
    serving.serve(servable(tmp_path, "v1", 1))
    head = Head(method="POST", path=("v2", "models", "digits", "feedback"), keep_alive=True)
    with pytest.raises(HttpError, match=f"on the Unix socket only, unless {switch}$") as refused:
        Routes(serving, managed=managed, body_cap=4096).plan(head, over_tcp=True)
    assert 403 == refused.value.status
    serving.close()


def test_a_missing_extra_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "grpc", raising=False)
    with pytest.raises(Trouble, match="gRPC is not installed") as trouble:
        data_plane_options(InferenceSettings(grpc="127.0.0.1:8001"), "info")
    assert "edgewarden[grpc]" in trouble.value.remedy


@pytest.mark.parametrize("address", ["0.0.0.0:8001", "8001", "device.example:8001", "127.0.0.1:99999"])
def test_only_loopback_addresses_are_taken(tmp_path: Path, address: str) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'[inference]\ngrpc = "{address}"\n')
    with pytest.raises(BadSettings, match=r"inference\.grpc"):
        load_settings(file)
