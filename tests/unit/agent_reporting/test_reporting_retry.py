import pytest

from agent.core.retry import BackOff, after_failure, spread

BACK_OFF = BackOff(first=1.0, ceiling=60.0)


@pytest.mark.parametrize(
    ("failures", "interval"), [(-1, 0), (0, 0), (1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (8, 60), (10**9, 60)]
)
def test_the_interval_doubles_up_to_the_ceiling(failures: int, interval: float) -> None:
    assert interval == BACK_OFF.interval(failures)


@pytest.mark.parametrize(("chance", "delay"), [(0.0, 0.0), (0.5, 2.0), (0.999, 3.996)])
def test_the_delay_is_drawn_from_the_whole_interval(chance: float, delay: float) -> None:
    assert delay == pytest.approx(BACK_OFF.delay(3, chance))


@pytest.mark.parametrize(("retry_after", "delay"), [(None, 1.0), (30.0, 31.0), (-5.0, 1.0)])
def test_the_server_may_ask_for_more_but_not_for_less(retry_after: float | None, delay: float) -> None:
    assert delay == after_failure(BACK_OFF, 2, 0.5, retry_after)


def test_polls_drift_apart() -> None:
    assert [10.0, 10.5] == [spread(10.0, chance) for chance in (0.0, 0.5)]
