"""Loading and unloading by local clients: allowed or not, and never against the fleet's word."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc
import tritonclient.http
from inference_parts import IMAGE, engine, servable

from agent.inference.engine import Engine, UnknownModel
from agent.inference.loading import CannotServe, Servable
from agent.inference.parsing import Head, HttpError
from agent.inference.repository import FLEET_DECIDES, UNLOADED, ModelState, NotAllowed, Repository
from agent.inference.routes import Routes
from agent.inference.service import Service


@pytest.fixture
def serving() -> Iterator[Engine]:
    one = engine()
    yield one
    one.close()


def shown(repository: Repository) -> list[tuple[str, int, str, str]]:
    return [(one.name, one.version, one.state.value, one.reason) for one in repository.index()]


def test_unload_and_load_again(tmp_path: Path, serving: Engine) -> None:
    repository = Repository(serving)
    repository.serve(servable(tmp_path, "v1", 1))
    assert [("digits", 1, "READY", "")] == shown(repository)
    repository.unload("digits")
    repository.unload("digits")  # again is fine
    assert [("digits", 1, "UNAVAILABLE", UNLOADED)] == shown(repository)
    with pytest.raises(UnknownModel):
        serving.find("digits")
    repository.load("digits")
    assert [("digits", 1, "READY", "")] == shown(repository)
    assert serving.find("digits").run("r", (IMAGE,))


def test_unknown_names_are_told_apart(tmp_path: Path, serving: Engine) -> None:
    repository = Repository(serving)
    repository.serve(servable(tmp_path, "v1", 1))
    for change in (repository.load, repository.unload):
        with pytest.raises(UnknownModel, match="'faces' is not known here; models that are: digits"):
            change("faces")


def test_where_it_is_forbidden_the_reason_is_given(tmp_path: Path, serving: Engine) -> None:
    repository = Repository(serving, forbidden=FLEET_DECIDES)
    repository.serve(servable(tmp_path, "v1", 1))
    for change in (repository.load, repository.unload):
        with pytest.raises(NotAllowed, match="managed by the fleet"):
            change("digits")
    assert [("digits", 1, "READY", "")] == shown(repository)


def test_the_fleets_orders_go_before_what_a_client_did(tmp_path: Path, serving: Engine) -> None:
    repository = Repository(serving)
    repository.serve(servable(tmp_path, "v1", 1))
    repository.unload("digits")
    repository.serve(servable(tmp_path, "v2", 2))
    assert [("digits", 2, "READY", "")] == shown(repository)
    repository.unload("digits")
    repository.load("digits")
    assert [("digits", 2, "READY", "")] == shown(repository)
    repository.withdraw("digits")
    assert [] == shown(repository)
    with pytest.raises(UnknownModel):
        repository.load("digits")


def test_what_was_unloaded_and_is_withdrawn_does_not_come_back(tmp_path: Path, serving: Engine) -> None:
    repository = Repository(serving)
    repository.serve(servable(tmp_path, "v1", 1))
    repository.unload("digits")
    repository.withdraw("digits")
    with pytest.raises(UnknownModel):
        repository.load("digits")
    assert [] == shown(repository)


def test_a_load_that_fails_leaves_what_serves(tmp_path: Path, serving: Engine) -> None:
    repository = Repository(serving)
    good, found = servable(tmp_path, "v1", 1), []

    def fetch() -> Servable:
        found.append(1)
        raise CannotServe("the file is gone")

    repository.serve(good, fetch)
    with pytest.raises(CannotServe, match="the file is gone"):
        repository.load("digits")
    assert [("digits", 1, "READY", "")] == shown(repository)
    repository.unload("digits")
    with pytest.raises(CannotServe):
        repository.load("digits")
    assert [("digits", 1, "UNAVAILABLE", "the file is gone")] == shown(repository)
    assert [1, 1] == found


def test_a_bundle_that_became_another_model_is_refused(tmp_path: Path, serving: Engine) -> None:
    repository = Repository(serving)
    repository.serve(servable(tmp_path, "v1", 1), lambda: servable(tmp_path, "v2", 2, model="faces"))
    with pytest.raises(CannotServe, match="came from holds faces now"):
        repository.load("digits")


def test_the_index_shows_a_load_that_is_under_way(tmp_path: Path, serving: Engine) -> None:
    repository = Repository(serving)
    one = servable(tmp_path, "v1", 1)
    seen = []

    def fetch() -> Servable:
        seen.extend(shown(repository))
        return one

    repository.serve(one, fetch)
    repository.unload("digits")
    repository.load("digits")
    assert [("digits", 1, ModelState.LOADING.value, "")] == seen


# ---------------------------------------------------------------- over HTTP's routes
def change(routes: Routes, what: str, body: bytes, model: str = "digits") -> tuple[int, object]:
    head = Head(method="POST", path=("v2", "repository", "models", model, what), keep_alive=True)
    try:
        response = routes.plan(head, over_tcp=True).answer(memoryview(body))
    except HttpError as error:
        return error.status, error.message
    return response.status, json.loads(response.body[0])


@pytest.mark.parametrize(
    ("what", "body", "model", "status", "said"),
    [
        pytest.param("load", b"", "digits", 200, "", id="load-empty"),
        pytest.param("load", b"{}", "digits", 200, "", id="load"),
        pytest.param("unload", b'{"parameters": {"unload_dependents": true}}', "digits", 200, "", id="unload"),
        pytest.param("load", b"{}", "faces", 404, "not known here", id="unknown"),
        pytest.param(
            "load", b'{"parameters": {"config": "{}"}}', "digits", 400, "'config' is not offered", id="config"
        ),
        pytest.param("load", b'{"parameters": {"file:1/m": "AA=="}}', "digits", 400, "'file:1/m'", id="file"),
        pytest.param("load", b'{"parameters": 3}', "digits", 400, "not what is expected", id="not-an-object"),
        pytest.param("load", b"nonsense", "digits", 400, "not what is expected", id="no-json"),
    ],
)
def test_each_way_to_load_has_its_answer(
    tmp_path: Path, serving: Engine, *, what: str, body: bytes, model: str, status: int, said: str
) -> None:
    repository = Repository(serving)
    repository.serve(servable(tmp_path, "v1", 1))
    routes = Routes(serving, managed=False, body_cap=2**20, service=Service(serving, repository))
    got, answer = change(routes, what, body, model)
    assert (status, True) == (got, said in str(answer)), answer


def test_under_a_fleet_the_refusal_names_the_setting(tmp_path: Path, serving: Engine) -> None:
    serving.serve(servable(tmp_path, "v1", 1))
    routes = Routes(serving, managed=True, body_cap=2**20)
    for what in ("load", "unload"):
        status, said = change(routes, what, b'{"parameters": {"config": "{}"}}')
        assert (400, True) == (status, "inference.allow_repository_control" in str(said))
    assert "model_repository" not in routes.service.describe()["extensions"]


def test_stock_clients_are_told_what_is_refused(tmp_path: Path) -> None:
    from protocol_world import world

    with world(tmp_path) as plane:
        for client_module, address in ((tritonclient.http, plane.http), (tritonclient.grpc, plane.grpc)):
            with client_module.InferenceServerClient(address) as client:
                client.unload_model("digits")
                assert not client.is_model_ready("digits")
                client.load_model("digits")
                assert client.is_model_ready("digits", "1")
                with pytest.raises(client_module.InferenceServerException, match="'config' is not offered"):
                    client.load_model("digits", config="{}")
                with pytest.raises(client_module.InferenceServerException, match="not known here"):
                    client.unload_model("faces")
