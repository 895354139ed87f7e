"""What is counted per version for `/metrics`: sums never go down, accuracy is of the last hour."""

import pytest
from data_world import MINUTE, NOW, report

from fleet_server.core.cohorts import JUDGED_OVER, LONGEST_OCTAVE, SHORTEST_OCTAVE, SILENT, Cohorts, bounds_us
from protocol.metrics import proportion
from protocol.statistics import Histogram, ModelStatistics, bucket_index, histogram_from

ONE, TWO, THREE = ("digits", 1), ("digits", 2), ("signs", 1)


def window(*, latencies: tuple[int, ...] = (), zero: int = 0, **counts: int) -> ModelStatistics:
    buckets: dict[int, int] = {}
    for latency in latencies:
        buckets[bucket_index(latency)] = buckets.get(bucket_index(latency), 0) + 1
    histogram = histogram_from(buckets, zero=zero, sum_=sum(latencies), max_=max(latencies, default=0))
    return ModelStatistics(digest="d", latency=histogram, **counts)


def truth(minute: int, right: int, wrong: int) -> object:
    cells = tuple(cell for cell in ((0, 0, right), (0, 1, wrong)) if cell[2])
    return report(1, start=minute, truth=cells).truth[0]


def test_devices_of_a_version_add_up() -> None:
    cohorts = Cohorts()
    cohorts.count_window(ONE, window(requests=10, errors=1, dropped=2), NOW)
    cohorts.count_window(ONE, window(requests=5, errors=0, dropped=1), NOW)
    (facts,) = cohorts.facts(NOW)
    assert (facts.requests, facts.errors, facts.dropped) == (15, 1, 3)


OCTAVES = {
    "no time at all": (0, 0),
    "far below the first bound": (3, 0),
    "exactly the first bound": (2**SHORTEST_OCTAVE, 0),
    "just above it": (2**SHORTEST_OCTAVE + 1, 1),
    "exactly a millisecond and a bit": (1024, 10 - SHORTEST_OCTAVE),
    "just above that": (1025, 11 - SHORTEST_OCTAVE),
    "exactly the last bound": (2**LONGEST_OCTAVE, LONGEST_OCTAVE - SHORTEST_OCTAVE),
    "longer than any bound": (2**30, LONGEST_OCTAVE - SHORTEST_OCTAVE + 1),
}


@pytest.mark.parametrize(("latency", "place"), OCTAVES.values(), ids=OCTAVES.keys())
def test_a_latency_counts_in_the_octave_that_holds_it(latency: int, place: int) -> None:
    cohorts = Cohorts()
    cohorts.count_window(ONE, window(latencies=(latency,)) if latency else window(zero=1), NOW)
    (facts,) = cohorts.facts(NOW)
    assert [index for index, n in enumerate(facts.octaves) if n] == [place]
    assert len(facts.octaves) == len(bounds_us()) + 1


def test_an_empty_histogram_counts_nothing() -> None:
    cohorts = Cohorts()
    cohorts.count_window(ONE, ModelStatistics(digest="d", latency=Histogram()), NOW)
    assert sum(cohorts.facts(NOW)[0].octaves) == 0


AGES = {
    "of this minute": (NOW, True),
    "of an hour ago": (NOW - JUDGED_OVER, True),
    "of more than an hour ago": (NOW - JUDGED_OVER - MINUTE, False),
    "of a clock slightly ahead": (NOW + MINUTE, True),
    "of a clock a day ahead": (NOW + 24 * 60 * MINUTE, False),
}


@pytest.mark.parametrize(("minute", "counts"), AGES.values(), ids=AGES.keys())
def test_truth_always_counts_for_the_sums_and_for_accuracy_within_the_hour(minute: int, counts: bool) -> None:
    cohorts = Cohorts()
    cohorts.count_truth(ONE, truth(minute, 8, 2), NOW)
    (facts,) = cohorts.facts(NOW)
    assert (facts.right, facts.judged) == (8, 10)
    assert facts.accuracy == (proportion(8, 10) if counts else None)


def test_accuracy_without_truth_is_absent_not_zero() -> None:
    cohorts = Cohorts()
    cohorts.count_window(ONE, window(requests=10), NOW)
    assert cohorts.facts(NOW)[0].accuracy is None


def test_accuracy_forgets_after_an_hour_and_the_sums_do_not() -> None:
    cohorts = Cohorts()
    cohorts.count_truth(ONE, truth(NOW, 8, 2), NOW)
    (later,) = cohorts.facts(NOW + JUDGED_OVER + MINUTE)
    assert (later.accuracy, later.judged) == (None, 10)


def test_truth_from_before_the_start_is_in_the_accuracy_and_not_in_the_sums() -> None:
    cohorts = Cohorts()
    cohorts.recall(ONE, NOW, 80, 100, NOW)
    cohorts.count_truth(ONE, truth(NOW, 8, 2), NOW)
    (facts,) = cohorts.facts(NOW)
    assert (facts.accuracy, facts.judged) == (proportion(88, 110), 10)


def test_what_has_no_name_is_counted_as_others() -> None:
    cohorts = Cohorts()
    cohorts.count_window(None, window(requests=3), NOW)
    assert [(facts.version, facts.requests) for facts in cohorts.facts(NOW)] == [(None, 3)]


def test_one_version_too_many_is_counted_as_others() -> None:
    cohorts = Cohorts(most=2)
    for version in (ONE, TWO, THREE, THREE):
        cohorts.count_window(version, window(requests=1), NOW)
    assert [(f.version, f.requests) for f in cohorts.facts(NOW)] == [(ONE, 1), (TWO, 1), (None, 2)]


def test_a_new_version_takes_the_place_of_the_one_that_was_silent_for_longest() -> None:
    cohorts = Cohorts(most=2)
    cohorts.count_window(ONE, window(requests=1), NOW)
    cohorts.count_window(TWO, window(requests=1), NOW + 1)
    cohorts.count_window(THREE, window(requests=1), NOW + SILENT)
    assert [facts.version for facts in cohorts.facts(NOW + SILENT)] == [TWO, THREE]


def test_sums_of_others_never_go_down_when_a_place_is_given_away() -> None:
    cohorts = Cohorts(most=1)
    cohorts.count_window(ONE, window(requests=1), NOW)
    cohorts.count_window(TWO, window(requests=7), NOW)
    cohorts.count_window(TWO, window(requests=1), NOW + SILENT)
    assert [(f.version, f.requests) for f in cohorts.facts(NOW + SILENT)] == [(TWO, 1), (None, 7)]
