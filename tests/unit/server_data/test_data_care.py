"""How careful an order is, and what came of it: as people give it, and as they are shown it."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer
from data_world import DIGEST, birth, bundle, enrol, event
from typer.testing import CliRunner
from web_world import Web, running_web

from fleet_server.adapters.database.registry import DatabaseDesiredStates, DatabaseReleases
from fleet_server.api_types import DeployRequest, DeviceView, EventView, RollbackRequest
from fleet_server.cli import terms
from fleet_server.cli.__main__ import app
from fleet_server.cli.orders import _progress
from fleet_server.core.care import newest_sentence
from fleet_server.ports import Assigned, Batch, SignedDesire
from fleet_server.web.console import words
from protocol.messages import Event, RunningModel
from protocol.release import Assignment, DeviceConfig, ShadowTerms
from protocol.states import DeploymentState as S
from protocol.states import EventKind, PresenceState, RejectReason

AGREED = "candidate bb agreed with aa on 198 of 200 requests (99.0%)"
SURVIVED = "120 requests in 3 s; 20 golden samples agree"


# ---------------------------------------------------------------- in words
def test_every_state_kind_and_reason_has_words() -> None:
    for state in S:
        assert words.deployment(state).word
    for presence in PresenceState:
        assert words.presence(presence).word
    for kind in EventKind:
        assert words.kind(kind)
    assert set(words.REASON) == set(RejectReason)
    assert [] == [reason for reason in RejectReason if "-" in words.reason(reason)]


def told(*steps: tuple[S, str] | tuple[S, str, RejectReason], model: str = "digits") -> list[Event]:
    return [
        event(n, model=model, state=step[0], detail=step[1], reason=step[2] if len(step) > 2 else None)
        for n, step in enumerate(steps, 1)
    ]


SENTENCES = {
    "nothing was said": ([], ("", "")),
    "no shadow: the trial's sentence is none of a shadow": (
        told((S.SELFTEST, ""), (S.SWAPPING, "20 golden"), (S.PROBATION, "swapped"), (S.COMMITTED, SURVIVED)),
        (SURVIVED, ""),
    ),
    "it agreed": (
        told((S.SHADOW, "20 golden"), (S.SWAPPING, AGREED), (S.PROBATION, "swapped"), (S.COMMITTED, SURVIVED)),
        (SURVIVED, AGREED),
    ),
    "it is still compared": (told((S.SHADOW, "20 golden")), ("20 golden", "")),
    "it differs": (
        told((S.SHADOW, ""), (S.REJECTED, "less than asked", RejectReason.SHADOW_FAILED)),
        ("less than asked", "less than asked"),
    ),
    "the next target begins anew": (
        told((S.SHADOW, ""), (S.SWAPPING, AGREED), (S.COMMITTED, SURVIVED), (S.VERIFIED, "")), ("", ""),
    ),
    "another model's steps are not its own": (told((S.COMMITTED, SURVIVED), model="wake"), ("", "")),
    "it waits": (told((S.STAGED, ""), (S.STAGED, "waits: an application holds updates")),
                 ("waits: an application holds updates", "")),
}  # fmt: skip


@pytest.mark.parametrize(("events", "expected"), SENTENCES.values(), ids=SENTENCES.keys())
def test_the_sentences_of_a_models_steps(events: list[Event], expected: tuple[str, str]) -> None:
    assert newest_sentence(events, "digits") == expected


# ---------------------------------------------------------------- as people write it
@pytest.mark.parametrize("text", ["", "101%", "-1%", "20.55%", "half", "1e2", "0x10", "20%%", "٢٠%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a share"):
        terms.read_share(text)


@pytest.mark.parametrize("text", ["", "0", "10d", "-5s", "1h30m", "8000000", "200h", "٩s"])
def test_what_is_no_span_of_time_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a time"):
        terms.read_seconds(text)


def test_a_shadow_has_the_terms_that_were_said_and_the_usual_ones() -> None:
    assert terms.shadow_terms(200, requests=None, seconds=60, agreement=0) == ShadowTerms(
        share=200, seconds=60, agreement=0
    )
    assert terms.shadow_terms(None, requests=None, seconds=None, agreement=None) is None


# ---------------------------------------------------------------- through the web
@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """cam-1 was ordered digits 2 by force and in the shadow, and has committed it."""
    with running_web(tmp_path_factory.mktemp("care")) as running:
        enrol(running.engine, "cam-1")
        two = bundle(2, sha256=DIGEST)
        DatabaseReleases(running.engine).add_bundles([two])
        assignment = Assignment(rollout="r", forced=True, shadow=ShadowTerms(share=200))
        wanted = SignedDesire(
            device="cam-1",
            version=1,
            assigned=(Assigned(bundle=two, assignment=assignment),),
            config=DeviceConfig(),
            timestamp=b"ts",
            snapshot=b"sn",
            targets=b"tg",
            issued_at=0,
            expires_at=2**60,
        )
        DatabaseDesiredStates(running.engine).save_desired(wanted)
        now = running.clock()
        steps = told((S.SHADOW, ""), (S.SWAPPING, AGREED), (S.PROBATION, ""), (S.COMMITTED, SURVIVED))
        model = RunningModel(model="digits", state=S.COMMITTED, version=2, digest=DIGEST)
        came = Batch(
            states=[("cam-1", birth(at=now, models=(model,)))],
            events=[("cam-1", msgspec.structs.replace(step, at=now - 9, version=2)) for step in steps],
            received_at=now,
        )
        running.telemetry.store(came)
        yield running


@pytest.fixture(scope="module")
def me(web: Web) -> dict[str, str]:
    return web.login()


@pytest.fixture(scope="module")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commands log in once."""
    return tmp_path_factory.mktemp("session")


@pytest.fixture
def run(web: Web, session_folder: Path, monkeypatch: pytest.MonkeyPatch) -> "Command":
    monkeypatch.setenv("XDG_CONFIG_HOME", str(session_folder))
    monkeypatch.setenv("EDGEWARDEN_SERVER", web.url)
    monkeypatch.setenv("EDGEWARDEN_PASSWORD", "correct horse")
    return Command()


class Command:
    """Runs commands in this process."""

    def __call__(self, *arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, arguments)
        return result.exit_code, result.output


def test_a_device_is_shown_with_its_order_and_both_verdicts(web: Web, me: dict[str, str], run: Command) -> None:
    code, printed = run("devices", "show", "cam-1")
    page = web.request("GET", "/devices/cam-1", headers=me).data.decode()
    for shown in (printed, page):
        order = "forced; shadow: 20 % of the requests, until 200 or 10 min, 95 % must agree"
        assert [] == [sentence for sentence in (order, AGREED, SURVIVED) if sentence not in shown]
    assert code == 0


def test_the_list_of_devices_says_nothing_of_steps_before_the_birth(web: Web, me: dict[str, str]) -> None:
    data = web.request("GET", "/api/v1/devices", headers=me).data
    (view,) = msgspec.json.decode(data, type=tuple[DeviceView, ...])
    (model,) = view.models
    assert (model.forced, model.shadow, model.detail) == (True, ShadowTerms(share=200), "")


def test_a_terminal_is_not_steered_by_what_a_device_says(web: Web, run: Command) -> None:
    hostile = event(9, at=web.clock(), version=2, detail="\x1b[31mred")
    web.telemetry.store(Batch(events=[("cam-1", hostile)], received_at=web.clock()))
    assert "\x1b" not in run("devices", "show", "cam-1")[1]


def test_options_become_the_order(run: Command, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[DeployRequest | RollbackRequest] = []

    def refuse(request: DeployRequest | RollbackRequest, by: str, now: int) -> None:
        del by, now
        given.append(request)
        raise ZeroDivisionError  # the order itself is not of interest

    rollouts = type(web.parts.rollouts)
    monkeypatch.setattr(rollouts, "deploy", lambda _, *order: refuse(*order))
    monkeypatch.setattr(rollouts, "rollback", lambda _, *order: refuse(*order))
    shadow = ["--shadow", "12.5%", "--shadow-requests", "40", "--shadow-for", "2m", "--agreement", "90%"]
    run("deploy", "digits", "2", "--all", "--force", *shadow)
    run("deploy", "digits", "2", "--all")
    run("rollback", "digits", "--all")
    run("rollback", "digits", "--all", "--wait")
    asked = ShadowTerms(share=125, requests=40, seconds=120, agreement=900)
    assert given == [
        DeployRequest(model="digits", version=2, all=True, force=True, shadow=asked),
        DeployRequest(model="digits", version=2, all=True),
        RollbackRequest(model="digits", all=True, force=True),
        RollbackRequest(model="digits", all=True, force=False),
    ]


WRONG = {
    "terms of no shadow": ["--agreement", "90%"],
    "a shadow of nothing": ["--shadow", "0%"],
    "more than all": ["--shadow", "200%"],
    "no time": ["--shadow", "10%", "--shadow-for", "soon"],
    "no request": ["--shadow", "10%", "--shadow-requests", "0"],
}


@pytest.mark.parametrize("words_", WRONG.values(), ids=WRONG.keys())
def test_terms_that_mean_nothing_are_wrong_usage(run: Command, words_: list[str]) -> None:
    code, printed = run("deploy", "digits", "2", "--all", *words_)
    assert (code, "Traceback" in printed) == (2, False)


def test_terms_out_of_bounds_are_refused_by_the_api(web: Web, me: dict[str, str]) -> None:
    body = b'{"model": "digits", "version": 2, "all": true, "shadow": {"share": 0}}'
    answer = web.request("POST", "/api/v1/deployments", headers=me, body=body)
    assert (answer.status, b"share" in answer.data) == (400, True)


def test_an_order_that_starts_over_on_other_terms_is_followed_further(web: Web) -> None:
    step = EventView(
        row=5, device="cam-1", at=0, received_at=0, kind=EventKind.DEPLOYMENT, model="digits", state=S.SUPERSEDED
    )
    (view,) = web.parts.queries.devices()
    starts_over, replaced = (_progress(view, "digits", target, step) for target in (2, 3))
    assert (starts_over.over, replaced.over) == (False, True)


# ---------------------------------------------------------------- warnings
def test_what_the_release_team_took_back_is_shown_where_it_runs(
    web: Web, me: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(web.parts.image), "hindrance", lambda *_: "digits 2 (int8) was yanked: <reads> 3 as 8")
    for path, more in (("/models", "not installed"), ("/", "1 device serves it")):
        page = web.request("GET", path, headers=me).data.decode()
        assert ("was yanked: &lt;reads&gt; 3 as 8" in page, more in page) == (True, True), path


def test_a_sound_fleet_shows_no_warning(web: Web, me: dict[str, str]) -> None:
    page = web.request("GET", "/", headers=me).data.decode()
    assert "To see to" not in page
