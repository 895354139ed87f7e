"""Facts become families: every figure under its name, nothing without support, never more series than allowed."""

from dataclasses import replace

import pytest

from fleet_server.core.cohorts import CohortFacts, Version, bounds_us
from fleet_server.core.exposition import (
    MAX_ROLES,
    MAX_VERSIONS,
    Distribution,
    Family,
    FleetFacts,
    IngestFacts,
    Reading,
    ServerFacts,
    families,
    largest,
)
from protocol.metrics import proportion
from protocol.states import PresenceState

FLEET = FleetFacts(
    presence={PresenceState.ONLINE: 3, PresenceState.LOST: 1},
    serving={("digits", 2): 3, None: 1},
    missing={"telemetry": 4, "events": 0},
    dead_letters=2,
)
COHORT = CohortFacts(
    version=("digits", 2),
    requests=100,
    errors=2,
    dropped=3,
    octaves=(0,) * 4 + (90, 8) + (0,) * (len(bounds_us()) - 5),
    latency_sum_us=123_000,
    right=45,
    judged=50,
    accuracy=proportion(45, 50),
)
FACTS = ServerFacts(
    version="1.2.3",
    broker_up=True,
    ingest=IngestFacts(queued=7, limit=5000, written=1000, refused=1, failing=False),
    reading=Reading(fleet=FLEET, took_s=0.02, answered_s=0.001, at_s=1_790_000_000.5),
    cohorts=[COHORT],
    roles={"image-root": 1_790_000_000_000},
    certificates={"server": 1_800_000_000_000},
)


def told(facts: ServerFacts) -> dict[str, Family]:
    made = families(facts)
    assert len({family.name for family in made}) == len(made)
    return {family.name: family for family in made}


def values(facts: ServerFacts, name: str) -> dict[tuple[str, ...], float]:
    return {sample.labels: sample.value for sample in told(facts)[name].samples}


V2 = ("digits", "2")
FIGURES = {
    "edgewarden_server": {("1.2.3",): 1},
    "edgewarden_broker_up": {(): 1},
    "edgewarden_database_up": {(): 1},
    "edgewarden_database_seconds": {(): 0.001},
    "edgewarden_snapshot_seconds": {(): 0.02},
    "edgewarden_snapshot_timestamp_seconds": {(): 1_790_000_000.5},
    "edgewarden_ingest_queue_messages": {(): 7},
    "edgewarden_ingest_queue_limit_messages": {(): 5000},
    "edgewarden_ingest_failing": {(): 0},
    "edgewarden_ingest_messages": {(): 1000},
    "edgewarden_ingest_refused": {(): 1},
    "edgewarden_devices_serving": {V2: 3, ("other", "other"): 1},
    "edgewarden_ingest_missing_numbers": {("telemetry",): 4, ("events",): 0},
    "edgewarden_dead_letters_kept": {(): 2},
    "edgewarden_model_requests": {V2: 100},
    "edgewarden_model_errors": {V2: 2},
    "edgewarden_model_dropped": {V2: 3},
    "edgewarden_model_judged": {V2: 50},
    "edgewarden_model_correct": {V2: 45},
    "edgewarden_model_accuracy_ratio": {V2: 0.9},
    "edgewarden_model_accuracy_low_ratio": {V2: proportion(45, 50).low},
    "edgewarden_model_accuracy_high_ratio": {V2: proportion(45, 50).high},
    "edgewarden_model_accuracy_samples": {V2: 50},
    "edgewarden_trust_expiry_timestamp_seconds": {("image-root",): 1_790_000_000},
    "edgewarden_certificate_expiry_timestamp_seconds": {("server",): 1_800_000_000},
}


@pytest.mark.parametrize(("name", "expected"), FIGURES.items(), ids=FIGURES.keys())
def test_a_figure_is_told_under_its_name(name: str, expected: dict[tuple[str, ...], float]) -> None:
    assert expected == values(FACTS, name)


def test_every_presence_is_told_also_when_no_device_has_it() -> None:
    presence = values(FACTS, "edgewarden_devices")
    assert presence == {(s.value,): {"online": 3, "lost": 1}.get(s.value, 0) for s in PresenceState}


def test_latency_is_told_in_seconds_and_cumulative() -> None:
    (latency,) = told(FACTS)["edgewarden_model_latency_seconds"].distributions
    assert latency.bounds[:2] == (0.000064, 0.000128)
    assert (latency.cumulative()[3:7], latency.cumulative()[-1], latency.sum) == ((0, 90, 98, 98), 98, 0.123)


def test_without_truth_accuracy_is_absent() -> None:
    facts = replace(FACTS, cohorts=[replace(COHORT, accuracy=None)])
    for name in FIGURES:
        if name.startswith("edgewarden_model_accuracy"):
            assert values(facts, name) == {}


def test_without_a_database_the_fleet_is_absent_not_zero() -> None:
    facts = replace(FACTS, reading=Reading(fleet=None, took_s=5.0, answered_s=None, at_s=1.0))
    assert values(facts, "edgewarden_database_up") == {(): 0}
    for name in ("devices", "devices_serving", "ingest_missing_numbers", "dead_letters_kept", "snapshot_seconds"):
        assert values(facts, f"edgewarden_{name}") == {}


def test_the_names_are_the_same_whatever_the_facts() -> None:
    nothing = Reading(fleet=None, took_s=0, answered_s=None, at_s=0)
    empty = replace(FACTS, reading=nothing, cohorts=(), roles={}, certificates={})
    assert list(told(FACTS)) == list(told(empty))


def test_the_largest_versions_are_named_and_the_rest_is_one() -> None:
    counts: dict[Version | None, int] = {("m", k): k for k in range(1, 5)} | {None: 10}
    assert largest(counts, 2) == [(("m", "3"), 3), (("m", "4"), 4), (("other", "other"), 13)]


def test_nothing_is_left_over_when_all_are_named() -> None:
    assert largest({("m", 1): 1}, 2) == [(("m", "1"), 1)]


def test_the_number_of_series_is_bounded_whatever_the_fleet_runs() -> None:
    many = replace(FLEET, serving={("m", k): 1 for k in range(1000)})
    roles = {f"family-{k}": k for k in range(1000)}
    facts = replace(FACTS, reading=replace(FACTS.reading, fleet=many), roles=roles)
    assert len(values(facts, "edgewarden_devices_serving")) == MAX_VERSIONS + 1
    assert len(values(facts, "edgewarden_trust_expiry_timestamp_seconds")) == MAX_ROLES


def test_of_many_roles_those_that_expire_first_are_told() -> None:
    facts = replace(FACTS, roles={f"family-{k}": k * 1000 for k in range(1000)})
    assert max(values(facts, "edgewarden_trust_expiry_timestamp_seconds").values()) == MAX_ROLES - 1


def test_no_label_is_a_device() -> None:
    labels = {label for family in families(FACTS) for label in family.labels}
    assert labels == {"version", "presence", "model", "stream", "role", "certificate"}


def test_a_distribution_adds_up() -> None:
    assert Distribution(labels=(), bounds=(1.0, 2.0), counts=(1, 0, 2), sum=9.0).cumulative() == (1, 1, 3)
