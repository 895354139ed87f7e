"""Windows and truth put together: figures come from merged counts, per version and step."""

from dataclasses import replace

from fleet_server.core.running import models_now
from fleet_server.core.series import Judged, Measured, points, step_for, summarise, summarise_by_version
from protocol.messages import Birth, Event, RunningModel
from protocol.metrics import proportion
from protocol.states import DeploymentState as D
from protocol.states import EventKind, RejectReason
from protocol.statistics import bucket_index, histogram_from

M = 60_000


def window(start: int, version: int, latency: int, n: int = 1, errors: int = 0) -> Measured:
    histogram = histogram_from({bucket_index(latency): n}, zero=0, sum_=latency * n, max_=latency)
    return Measured(start=start, span=M, version=version, requests=n + errors, errors=errors, latency=histogram)


def test_quantiles_come_from_the_merged_histogram() -> None:
    summary = summarise([window(0, 1, 1000, 90), window(M, 1, 50_000, 10, errors=2)], [])
    assert (summary.requests, summary.errors) == (102, 2)
    assert summary.p50_us is not None
    assert abs(summary.p50_us - 1000) < 45
    assert summary.p95_us is not None
    assert abs(summary.p95_us - 50_000) < 2300


def test_what_was_turned_away_adds_up_with_the_reasons_that_are_known() -> None:
    one = replace(window(0, 1, 10), dropped=9, late=4, shed=3)
    summary = summarise([one, replace(one, start=M, late=0)], [])
    assert (summary.dropped, summary.late, summary.shed) == (18, 4, 6)


def test_accuracy_is_a_proportion_of_all_judged_predictions() -> None:
    judged = [Judged(minute=0, version=1, right=9, total=10), Judged(minute=M, version=1, right=81, total=90)]
    assert summarise([], judged).accuracy == proportion(90, 100)


def test_without_truth_accuracy_is_not_available() -> None:
    assert summarise([window(0, 1, 10)], []).accuracy is None


def test_versions_are_kept_apart() -> None:
    summaries = summarise_by_version(
        [window(0, 1, 10, 3), window(0, 2, 10, 5)], [Judged(minute=0, version=2, right=1, total=2)]
    )
    assert {version: (s.requests, s.total) for version, s in summaries.items()} == {1: (3, 0), 2: (5, 2)}


def test_points_are_steps_of_time_per_version_and_truth_lies_where_its_minute_begins() -> None:
    found = points(
        [window(0, 1, 10), window(20_000, 1, 10), window(M, 1, 10), window(M, 2, 10)],
        [Judged(minute=M, version=2, right=1, total=1)],
        step=M,
    )
    assert [(p.start, p.version, p.summary.requests, p.summary.total) for p in found] == [
        (0, 1, 2, 0),
        (M, 1, 1, 0),
        (M, 2, 1, 1),
    ]


def test_a_step_is_whole_windows_and_not_too_many() -> None:
    assert (step_for(3_600_000, window=M), step_for(3_600_000, window=2000, most=90)) == (M, 40_000)


# ---------------------------------------------------------------- what runs now
def birth(at: int, state: D = D.COMMITTED, version: int = 2) -> Birth:
    model = RunningModel(model="digits", state=state, version=version, digest="aa" * 32)
    return Birth(boot="b", connection=1, at=at, agent="1", device_class="x", models=(model,))


def step(at: int, state: D, version: int = 3, reason: RejectReason | None = None) -> Event:
    return Event(
        spool="s",
        sequence=at,
        at=at,
        kind=EventKind.DEPLOYMENT,
        model="digits",
        version=version,
        digest="bb" * 32,
        state=state,
        reason=reason,
    )


def now(*events: Event, start: Birth | None = None) -> list[tuple[int | None, str, RejectReason | None]]:
    models = models_now(start or birth(10), events)
    return [(model.version, model.state.value, model.reason) for model in models]


def test_steps_before_the_birth_are_in_the_birth() -> None:
    assert now(step(5, D.FAILED)) == [(2, "committed", None)]


def test_a_download_leaves_the_running_version() -> None:
    assert now(step(11, D.DOWNLOADING)) == [(2, "downloading", None)]


def test_a_version_on_probation_serves() -> None:
    assert now(step(11, D.SWAPPING), step(12, D.PROBATION)) == [(3, "probation", None)]


def test_a_rollback_restores_what_served_before() -> None:
    reason = RejectReason.CRASHED_IN_PROBATION
    assert now(step(11, D.PROBATION), step(12, D.ROLLED_BACK, reason=reason)) == [(2, "rolled-back", reason)]


def test_a_device_without_birth_is_known_by_its_steps() -> None:
    models = models_now(None, [step(1, D.COMMITTED)])
    assert [(model.version, model.digest) for model in models] == [(3, "bb" * 32)]
