import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.merging import (
    MAX_MERGED_SPAN,
    MAX_WINDOWS,
    CannotMerge,
    fits,
    merge_payloads,
    merge_reports,
    merge_windows,
    split,
)
from protocol.codec import decode_report, encode
from protocol.messages import Report, Resources, Window
from protocol.statistics import Histogram, ModelStatistics, TruthStatistics, merge_by_digest, merge_truth

MINUTE = 60_000


def window(minute: int, requests: int = 1, digest: str = "d1", resources: Resources | None = None) -> Window:
    model = ModelStatistics(digest=digest, requests=requests, latency=Histogram(offset=60, counts=(requests,)))
    return Window(start=minute * MINUTE, span=MINUTE, models=(model,), resources=resources)


def report(sequence: int, *windows: Window, covers: int = 1, truth: tuple[TruthStatistics, ...] = ()) -> Report:
    return Report(spool="s", sequence=sequence, covers=covers, windows=windows, truth=truth)


def spans(windows: tuple[Window, ...]) -> list[tuple[int, int, int]]:
    return [(w.start // MINUTE, w.span // MINUTE, sum(m.requests for m in w.models)) for w in windows]


def test_neighbours_become_one_report_that_covers_both() -> None:
    merged = merge_reports(report(6, window(1, 2), covers=2), report(7, window(2, 3)))
    assert (7, 3) == (merged.sequence, merged.covers)
    assert [(1, 2, 5)] == spans(merged.windows)


WINDOWS = [
    ("that follow each other are added", [window(1), window(2), window(3)], [(1, 3, 3)]),
    ("with a short hole between them are added", [window(1), window(3)], [(1, 3, 2)]),
    ("with a long hole between them stay apart", [window(1), window(9)], [(1, 1, 1), (9, 1, 1)]),
    ("that overlap stay apart", [window(5), window(5)], [(5, 1, 1), (5, 1, 1)]),
    ("of other models stay apart", [window(1), window(2, digest="d2")], [(1, 1, 1), (2, 1, 1)]),
    ("in the wrong order stay apart", [window(5), window(1)], [(5, 1, 1), (1, 1, 1)]),
]


@pytest.mark.parametrize(("windows", "expected"), [case[1:] for case in WINDOWS], ids=[case[0] for case in WINDOWS])
def test_windows(windows: list[Window], expected: list[tuple[int, int, int]]) -> None:
    assert expected == spans(merge_windows(tuple(windows)))


def test_no_window_grows_beyond_a_day() -> None:
    day = MAX_MERGED_SPAN // MINUTE
    merged = merge_windows(tuple(window(minute) for minute in range(2 * day)))
    assert [(0, day, day), (day, day, day)] == spans(merged)


def test_readings_keep_their_meaning() -> None:
    first = Resources(cpu=100, memory=1, network_in=5, temperature=400, disk_free=9)
    last = Resources(cpu=200, memory=2, network_in=6, temperature=390)
    (merged,) = merge_windows((window(1, resources=first), window(2, resources=last)))
    assert Resources(cpu=150, memory=2, network_in=11, temperature=400, disk_free=9) == merged.resources


STRANGERS = [
    ("not neighbours", report(1, window(1)), report(3, window(2))),
    ("wrong order", report(2, window(1)), report(1, window(2))),
    ("another spool", report(1), Report(spool="other", sequence=2)),
    ("too many windows", report(1, *[window(3 * k) for k in range(MAX_WINDOWS)]), report(2, window(99))),
]


@pytest.mark.parametrize(("older", "newer"), [case[1:] for case in STRANGERS], ids=[case[0] for case in STRANGERS])
def test_what_does_not_belong_together_is_refused(older: Report, newer: Report) -> None:
    with pytest.raises(CannotMerge):
        merge_reports(older, newer)
    assert merge_payloads(encode(older), encode(newer)) is None


def test_payloads_merge_into_fewer_bytes() -> None:
    older, newer = (encode(report(k, window(k)), codec=1) for k in (1, 2))
    merged = merge_payloads(older, newer)
    assert merged is not None
    assert len(merged) < len(older) + len(newer)
    assert [(1, 2, 2)] == spans(decode_report(merged).windows)


def test_garbage_does_not_merge() -> None:
    assert merge_payloads(b"\x00{", encode(report(2))) is None


# ---------------------------------------------------------------- cutting
def cut_all(whole: Report) -> list[Report]:
    parts = split(whole)
    return [whole] if parts is None else [piece for part in parts for piece in cut_all(part)]


models = st.builds(
    ModelStatistics,
    digest=st.sampled_from(["d1", "d2", "d3"]),
    requests=st.integers(0, 9),
    classes=st.lists(st.integers(0, 9), max_size=3).map(tuple),
)
windows = st.builds(
    Window,
    start=st.integers(0, 5).map(lambda k: k * MINUTE),
    span=st.just(MINUTE),
    models=st.lists(models, max_size=3, unique_by=lambda m: m.digest).map(tuple),
    resources=st.just(Resources(cpu=1)),
)
cells = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 9))
truths = st.builds(
    TruthStatistics,
    digest=st.sampled_from(["d1", "d2"]),
    minute=st.integers(0, 2),
    confusion=st.lists(cells, max_size=4).map(tuple),
)
reports = st.builds(
    Report,
    spool=st.just("s"),
    sequence=st.just(1),
    windows=st.lists(windows, max_size=3).map(tuple),
    truth=st.lists(truths, max_size=3).map(tuple),
)


@given(reports)
def test_however_a_report_is_cut_the_counts_stay(whole: Report) -> None:
    parts = cut_all(whole)
    assert merge_by_digest(m for w in whole.windows for m in w.models) == merge_by_digest(
        m for part in parts for w in part.windows for m in w.models
    )
    assert merge_truth(whole.truth) == merge_truth(t for part in parts for t in part.truth)
    assert len(whole.windows) == sum(w.resources is not None for part in parts for w in part.windows)


def test_a_report_over_the_cap_does_not_fit() -> None:
    large = report(
        1, truth=(TruthStatistics(digest="d", minute=0, confusion=tuple((k, k, k) for k in range(40_000))),)
    )
    assert not fits(large, encode(large, codec=1))
    assert fits(report(1), encode(report(1)))


@given(reports, reports)
def test_merging_two_reports_keeps_the_counts(older: Report, newer: Report) -> None:
    newer = msgspec.structs.replace(newer, sequence=2)
    merged = merge_reports(older, newer)
    both = (*older.windows, *newer.windows)
    assert merge_by_digest(m for w in both for m in w.models) == merge_by_digest(
        m for w in merged.windows for m in w.models
    )
    assert merge_truth((*older.truth, *newer.truth)) == merged.truth
