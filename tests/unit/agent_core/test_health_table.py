"""The device's own verdicts: probation, shadow, hold and hours, as tables of named cases."""

from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from agent.core import shadowing
from agent.core.health import GoldenRun, HealthLimits, Probation, Verdict, judge
from agent.core.holding import MAX_HOLD_MS, must_wait, parse_hours
from agent.core.recent import SPAN_SECONDS, Recent
from agent.core.shadowing import ShadowCounts
from protocol.release import ShadowTerms
from protocol.states import RejectReason
from protocol.statistics import CONFIDENCE_BINS, ModelStatistics, bucket_index, histogram_from

LENGTH = 60_000
GOOD = GoldenRun(passed=True, detail="8 golden samples agree")


def counted(requests: int = 1000, *, errors: int = 0, microseconds: int = 2000, unsure: int = 0) -> ModelStatistics:
    """Return statistics whose answers all took the same time, ``unsure`` of them below one half."""
    answered = requests - errors
    confidence = [0] * CONFIDENCE_BINS
    confidence[2], confidence[18] = unsure, answered - unsure
    latency = histogram_from(
        {bucket_index(microseconds): answered}, zero=0, sum_=answered * microseconds, max_=microseconds
    )
    return ModelStatistics(
        digest="d", requests=requests, errors=errors, latency=latency, confidence=tuple(confidence)
    )


@dataclass(frozen=True)
class Case:
    name: str
    verdict: Verdict
    reason: RejectReason | None = None
    now: ModelStatistics | None = None
    before: ModelStatistics | None = None
    golden: GoldenRun | None = GOOD
    elapsed: int = LENGTH


CASES = [
    Case("time is not up", Verdict.WATCH, now=counted(), before=counted(), elapsed=LENGTH - 1, golden=None),
    Case("time is up: the golden samples are asked", Verdict.RUN_GOLDEN, golden=None),
    Case("nobody asked anything, the golden samples agree", Verdict.HEALTHY),
    Case("as good as before", Verdict.HEALTHY, now=counted(), before=counted()),
    Case(
        "the golden samples fail",
        Verdict.SICK,
        RejectReason.GOLDEN_FAILED,
        golden=GoldenRun(passed=False, detail="sample 3 is off"),
        elapsed=0,
    ),
    Case("many errors", Verdict.SICK, RejectReason.TOO_MANY_ERRORS, counted(100, errors=30), elapsed=0),
    Case("many errors of few requests say nothing", Verdict.HEALTHY, now=counted(10, errors=10)),
    Case("some errors within chance", Verdict.HEALTHY, now=counted(100, errors=8)),
    Case("as many errors as before", Verdict.HEALTHY, now=counted(100, errors=30), before=counted(100, errors=28)),
    Case(
        "far more errors than before",
        Verdict.SICK,
        RejectReason.TOO_MANY_ERRORS,
        now=counted(100, errors=60),
        before=counted(100, errors=20),
    ),
    Case(
        "ten times slower",
        Verdict.SICK,
        RejectReason.TOO_SLOW,
        now=counted(microseconds=20_000),
        before=counted(microseconds=2_000),
    ),
    Case(
        "ten times slower, but still quick",
        Verdict.HEALTHY,
        now=counted(microseconds=1_000),
        before=counted(microseconds=100),
    ),
    Case("slow, with nothing to compare", Verdict.HEALTHY, now=counted(microseconds=900_000)),
    Case(
        "much less sure",
        Verdict.SICK,
        RejectReason.CONFIDENCE_COLLAPSED,
        now=counted(unsure=600),
        before=counted(unsure=100),
    ),
    Case("a little less sure", Verdict.HEALTHY, now=counted(unsure=300), before=counted(unsure=100)),
    Case("less sure of few requests says nothing", Verdict.HEALTHY, now=counted(20, unsure=20), before=counted()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_probation(case: Case) -> None:
    probation = Probation(
        elapsed_ms=case.elapsed, length_ms=LENGTH, before=case.before, now=case.now, golden=case.golden
    )
    finding = judge(probation, HealthLimits())
    assert (case.verdict, case.reason) == (finding.verdict, finding.reason)
    assert (case.verdict in (Verdict.SICK, Verdict.HEALTHY)) == bool(finding.detail)


# ---------------------------------------------------------------- shadow
TERMS = ShadowTerms(share=100, requests=200, seconds=600, agreement=950)


def compared(compared: int, agreed: int, failed: int = 0) -> ShadowCounts:
    return ShadowCounts(stable="a", candidate="b", compared=compared, agreed=agreed, failed=failed)


SHADOWS = [
    ("nothing yet", None, 0, None),
    ("too few", compared(100, 100), 1000, None),
    ("enough agree", compared(200, 198), 1000, True),
    ("enough, and too few agree", compared(200, 180), 1000, False),
    ("hopeless before there is enough", compared(50, 10), 1000, False),
    ("a bad start is no verdict", compared(10, 9), 1000, None),
    ("it fails requests", compared(100, 100, failed=50), 1000, False),
    ("time is up with too few: they decide", compared(20, 20), 600_000, True),
    ("time is up with too few, and they differ", compared(20, 10), 600_000, False),
    ("nobody asked anything", None, 600_000, True),
]


@pytest.mark.parametrize(("name", "counts", "elapsed", "expected"), SHADOWS, ids=[row[0] for row in SHADOWS])
def test_shadow(name: str, counts: ShadowCounts | None, elapsed: int, expected: bool | None) -> None:
    verdict = shadowing.judge(counts, TERMS, elapsed)
    assert expected == (verdict.agreed if verdict else None)


# ---------------------------------------------------------------- hold and hours
BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> int:
    """Return UTC ms of a local time in Berlin."""
    return int(datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp() * 1000)


NIGHT = (parse_hours("22:30-05:00"),)
NOON = (parse_hours("11:00-12:00"), parse_hours("13:00-14:00"))
WAITS = [
    ("no hours, no hold", "2026-06-01T10:00", 0, (), None),
    ("before the hours", "2026-06-01T10:00", 0, NOON, "2026-06-01T11:00"),
    ("within the hours", "2026-06-01T11:59", 0, NOON, None),
    ("between two spans", "2026-06-01T12:00", 0, NOON, "2026-06-01T13:00"),
    ("after the last: tomorrow", "2026-06-01T14:00", 0, NOON, "2026-06-02T11:00"),
    ("past midnight, late", "2026-06-01T23:00", 0, NIGHT, None),
    ("past midnight, early", "2026-06-02T04:59", 0, NIGHT, None),
    ("past midnight, by day", "2026-06-02T05:00", 0, NIGHT, "2026-06-02T22:30"),
    ("on the day the clock goes forward", "2026-03-29T12:00", 0, NIGHT, "2026-03-29T22:30"),
    ("held", "2026-06-01T11:30", at("2026-06-01T11:40"), NOON, "2026-06-01T11:40"),
    ("a hold that is over", "2026-06-01T11:30", at("2026-06-01T11:20"), NOON, None),
    ("a hold beyond a day is the clock's fault", "2026-06-01T11:30", at("2026-06-03T11:30"), NOON, None),
]


@pytest.mark.parametrize(("name", "now", "hold", "hours", "until"), WAITS, ids=[row[0] for row in WAITS])
def test_wait(name: str, now: str, hold: int, hours: tuple, until: str | None) -> None:
    wait = must_wait(at(now), hold=hold, hours=hours, zone=BERLIN, forced=False)
    assert (at(until) if until else None) == (wait.until if wait else None)


def test_what_is_forced_waits_for_nothing() -> None:
    now = at("2026-06-01T10:00")
    assert must_wait(now, hold=now + MAX_HOLD_MS, hours=NOON, zone=BERLIN, forced=True) is None


@pytest.mark.parametrize("text", ["", "2-3", "02:00", "25:00-26:00", "02:00-02:00", "02:00-xx"])
def test_hours_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_hours(text)


# ---------------------------------------------------------------- what a version did lately
def test_what_was_long_ago_is_forgotten() -> None:
    recent = Recent()
    assert recent.statistics is None
    for number in range(4):
        recent.add(counted(100), number * SPAN_SECONDS)
        assert min(number + 1, 2) * 100 == recent.statistics.requests
