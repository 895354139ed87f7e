"""Positions in a stream: whatever arrives in whatever order, what is missing is exactly what did not."""

from hypothesis import given
from hypothesis import strategies as st

from fleet_server.core.positions import MAX_MISSING_TOLD, MAX_RANGES, Position, arrived

NUMBERS = st.lists(st.integers(1, 60), max_size=80)


def after(*numbers: int) -> Position:
    position = Position()
    for number in numbers:
        position = arrived(position, number, number)
    return position


@given(NUMBERS)
def test_a_position_knows_exactly_what_arrived(numbers: list[int]) -> None:
    position = after(*numbers)
    expected = set(numbers)
    assert {n for n in range(1, 70) if position.has(n)} == expected
    missing = {n for first, last in position.missing() for n in range(first, last + 1)}
    assert missing == set(range(1, max(expected, default=0) + 1)) - expected
    assert position.count_missing() == len(missing)
    assert position.highest == max(expected, default=0)


@given(NUMBERS, st.randoms())
def test_order_and_repetition_do_not_matter(numbers: list[int], random: object) -> None:
    shuffled = [*numbers, *numbers]
    random.shuffle(shuffled)  # type: ignore[attr-defined]  # hypothesis gives a random.Random
    assert after(*shuffled) == after(*numbers)


def test_a_merged_report_fills_all_the_numbers_it_covers() -> None:
    position = arrived(after(1), 2, 5)
    assert (position, position.missing()) == (Position(upto=5), ())


def test_an_acknowledgement_lists_a_bounded_number_of_holes_and_stays_true() -> None:
    position = after(*range(2, 2000, 2))
    upto, holes = position.told()
    assert len(holes) == MAX_MISSING_TOLD
    told_missing = {n for first, last in holes for n in range(first, last + 1)}
    assert all(position.has(n) for n in range(1, upto + 1) if n not in told_missing)


def test_a_stream_of_holes_does_not_grow_without_bound() -> None:
    position = after(*range(2, 4 * MAX_RANGES, 2))
    assert len(position.above) < MAX_RANGES
    assert position.highest == 4 * MAX_RANGES - 2
