"""What the fakes promise to the tests that use them."""

import threading

import pytest

from agent.channel import TrialVerdict
from agent.core.deployment import Deployment
from agent.ports import Refusal, Trouble, TrustVersions, Weather
from protocol.manifest import check_manifest
from protocol.messages import DesiredState
from protocol.states import RejectReason
from simulator.fleet import identities_in
from simulator.memory import (
    DataPlaneCall,
    FakeDataPlane,
    FakeDownloads,
    FakeTrials,
    FakeTrust,
    InlineBackground,
    MemoryDeployments,
    MemoryStore,
    example_desire,
    example_digest,
    example_manifest,
    example_target,
)

EMPTY = DesiredState(timestamp=b"", snapshot=b"", targets=b"")
TARGET = example_target()


def test_a_script_is_played_in_order_and_its_end_repeats() -> None:
    first, second = example_desire(director_version=4), example_desire(director_version=5)
    trust = FakeTrust([first, Weather("storm"), second])
    assert first == trust.verify(EMPTY, 1)
    with pytest.raises(Weather):
        trust.verify(EMPTY, 2)
    assert [second, second] == [trust.verify(EMPTY, 3), trust.verify(EMPTY, 4)]
    assert TrustVersions(director=5) == trust.versions()
    assert [1, 2, 3, 4] == [now for _, now in trust.calls]


def test_a_download_succeeds_unless_the_script_says_otherwise() -> None:
    seen: list[int] = []
    downloads = FakeDownloads({TARGET.sha256: [Weather("storm"), "file.ewb"]})
    with pytest.raises(Weather):
        downloads.fetch(TARGET, seen.append, lambda: False)
    assert "file.ewb" == downloads.fetch(TARGET, seen.append, lambda: False)
    other = example_target(version=2)
    assert other.sha256 in downloads.fetch(other, seen.append, lambda: False)
    assert [1000, 1000] == seen


def test_a_download_that_is_held_can_be_cancelled() -> None:
    downloads = FakeDownloads(hold=threading.Event())
    with pytest.raises(Weather, match="cancelled"):
        downloads.fetch(TARGET, lambda _: None, lambda: True)


def test_a_store_holds_what_was_admitted_until_it_is_collected() -> None:
    digests = [example_digest("digits", version) for version in (1, 2)]
    store = MemoryStore({digest: example_manifest() for digest in digests})
    for digest in digests:
        store.stage(digest)
        assert store.admit(digest) == store.find(digest)
    store.activate("digits", digests[1])
    assert {"digits": digests[1]} == store.active()
    store.collect([digests[1]])
    assert store.find(digests[0]) is None
    store.activate("digits", None)
    assert {} == store.active()


def test_a_store_refuses_what_is_damaged_or_unknown() -> None:
    damaged = Refusal(RejectReason.BAD_BUNDLE, "torn")
    store = MemoryStore({TARGET.sha256: example_manifest()}, damaged={TARGET.sha256: damaged})
    for digest in (TARGET.sha256, "0" * 64):
        with pytest.raises(Refusal):
            store.admit(digest)


def test_trials_pass_unless_the_script_says_otherwise() -> None:
    trials = FakeTrials({TARGET.sha256: [TrialVerdict(passed=False)]})
    assert not trials.run("b", "f", TARGET).passed
    assert trials.run("b", "f", example_target(version=2)).passed


def test_a_data_plane_records_its_orders() -> None:
    heard: list[DataPlaneCall] = []
    plane = FakeDataPlane(heard.append)
    store = MemoryStore({TARGET.sha256: example_manifest()})
    plane.serve(1, store.admit(TARGET.sha256))
    plane.withdraw(2, "digits")
    assert [(1, "digits", True), (2, "digits", False)] == [(c.ticket, c.model, c.stored is not None) for c in heard]
    assert heard == plane.calls


def test_background_work_is_handed_back_in_turn() -> None:
    turns: list[object] = []
    done: list[int] = []
    InlineBackground(turns.append).submit("sum", lambda: 1 + 1, done.append)
    assert [] == done
    (turn,) = turns
    assert callable(turn)
    turn()
    assert [2] == done


def test_deployments_are_remembered_by_model() -> None:
    deployments = MemoryDeployments([Deployment(model="a")])
    deployments.save(Deployment(model="b", swap_tries=1))
    deployments.save(Deployment(model="b", swap_tries=2))
    assert {"a": 0, "b": 2} == {name: record.swap_tries for name, record in deployments.load().items()}


def test_examples_pass_their_own_checks() -> None:
    check_manifest(example_manifest())
    digests = {example_digest(model, version)[:16] for model in ("digits", "digits-large") for version in (1, 2, 10)}
    assert 6 >= len(digests) >= 3
    assert len({example_digest("digits", version)[:16] for version in range(1, 30)}) == 29


def test_a_folder_without_identities_is_trouble(tmp_path: object) -> None:
    with pytest.raises(Trouble, match="0 enrolled identities"):
        identities_in(tmp_path)
