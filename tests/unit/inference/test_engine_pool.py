"""The line before a model's interpreters: order, bounds, deadlines."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from agent.inference import pool as pool_module
from agent.inference.pool import (
    LOWEST,
    NORMAL,
    OVERTAKINGS,
    NoneFree,
    Pool,
    QueueFull,
    Retired,
    Shed,
    TooLate,
    TurnedAway,
    Urgency,
)

MS = 1_000_000  # ns


class Interpreter:
    """Stands for a loaded model: the pool only hands it around."""


def soon(ms: float, priority: int = 5) -> Urgency:
    return Urgency(priority, time.perf_counter_ns() + int(ms * MS))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Line:
    """Requests that stand in line on threads of their own; each gives its interpreter back at once."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.served: list[str] = []
        self.refused: dict[str, TurnedAway] = {}
        self.threads: list[threading.Thread] = []

    def join(self, name: str, urgency: Urgency) -> None:
        before = self.pool._number
        thread = threading.Thread(target=self._ask, args=(name, urgency))
        self.threads.append(thread)
        thread.start()
        wait_until(lambda: self.pool._number > before or name in self.refused or name in self.served)

    def _ask(self, name: str, urgency: Urgency) -> None:
        try:
            model = self.pool.lease(urgency)
        except TurnedAway as refusal:
            self.refused[name] = refusal
            return
        self.served.append(name)
        self.pool.give_back(model)

    def end(self) -> None:
        for thread in self.threads:
            thread.join(5)


@contextmanager
def busy(pool: Pool) -> Iterator[Line]:
    """Hold every interpreter until the block ends, then let the line through."""
    held = [pool.lease() for _ in range(pool.size)]
    line = Line(pool)
    try:
        yield line
    finally:
        for model in held:
            pool.give_back(model)
        line.end()


@pytest.fixture
def pool() -> Pool:
    return Pool([Interpreter()], limit=8)


def test_the_more_urgent_goes_first_and_equals_in_the_order_they_came(pool: Pool) -> None:
    with busy(pool) as line:
        for name, priority in (("a", 5), ("b", 9), ("c", 1), ("d", 5), ("e", 1)):
            line.join(name, Urgency(priority))
    assert line.served == ["c", "e", "a", "d", "b"]


def test_a_full_line_turns_the_newcomer_away_unless_somebody_less_urgent_waits() -> None:
    pool = Pool([Interpreter()], limit=3)
    with busy(pool) as line:
        line.join("low", Urgency(9))
        line.join("normal", Urgency(5))
        line.join("another", Urgency(9))
        line.join("urgent", Urgency(1))
    assert line.served == ["urgent", "normal"]
    assert {name: type(why) for name, why in line.refused.items()} == {"low": QueueFull, "another": QueueFull}


def test_a_deadline_that_cannot_be_made_is_refused_at_once(pool: Pool) -> None:
    model = pool.lease()
    pool.give_back(model, took_ns=100 * 50 * MS)  # the average starts at 0 and takes a tenth: 500 ms
    with busy(pool):
        started = time.monotonic()
        with pytest.raises(TooLate, match="1 requests are ahead, about 500000 us") as refused:
            pool.lease(soon(200))
        assert time.monotonic() - started < 0.1
        assert refused.value.retry_after == 1


def test_who_is_more_urgent_has_fewer_ahead(pool: Pool) -> None:
    pool.give_back(pool.lease(), took_ns=200 * MS)  # average 20 ms
    with busy(pool) as line:
        for k in range(4):
            line.join(f"low{k}", Urgency(9))
        with pytest.raises(TooLate, match="5 requests are ahead"):
            pool.lease(soon(90, priority=9))
        line.join("urgent", soon(5000, priority=1))
    assert line.served[0] == "urgent"


def test_a_deadline_that_passes_in_line_is_refused_then(pool: Pool) -> None:
    with busy(pool):
        started = time.monotonic()
        with pytest.raises(TooLate, match="passed while the request waited"):
            pool.lease(soon(30))
        assert 0.02 < time.monotonic() - started < 2
        assert pool.waiting == 1


def test_an_idle_interpreter_is_tried_whatever_the_average_says(pool: Pool) -> None:
    pool.give_back(pool.lease(), took_ns=3600 * 1000 * MS)
    pool.give_back(pool.lease(soon(1000)))


def test_nobody_waits_for_ever(pool: Pool) -> None:
    with busy(pool):
        with pytest.raises(NoneFree):
            pool.lease(patience=0.01)
        assert pool.waiting == 1


def test_a_retired_pool_serves_its_line_and_nobody_else(pool: Pool) -> None:
    with busy(pool) as line:
        line.join("before", Urgency())
        pool.retire()
        with pytest.raises(Retired):
            pool.lease()
    assert line.served == ["before"]
    assert len(pool.empty()) == 1


def test_a_failing_pool_turns_its_line_away(pool: Pool) -> None:
    held = pool.lease()
    line = Line(pool)
    line.join("waits", Urgency())
    pool.fail(TurnedAway("it hangs"))
    line.end()
    assert str(line.refused["waits"]) == "it hangs"
    with pytest.raises(TurnedAway, match="it hangs"):
        pool.lease()
    pool.give_back(held)


def test_a_narrowed_pool_works_on_fewer_at_once_and_sheds_what_may_wait() -> None:
    pool = Pool([Interpreter(), Interpreter()], limit=8)
    pool.restrict(width=1, lowest=5)
    first = pool.lease()
    with pytest.raises(NoneFree):
        pool.lease(patience=0.01)
    with pytest.raises(Shed, match="priorities up to 5"):
        pool.lease(Urgency(6))
    line = Line(pool)
    line.join("waits", Urgency(5))
    pool.restrict()
    line.end()
    assert line.served == ["waits"]
    pool.give_back(first)
    pool.give_back(pool.lease(Urgency(LOWEST)))


# ---------------------------------------------------------------- overtaking
def stand_in_line(pool: Pool, urgency: Urgency = NORMAL) -> pool_module._Waiter:
    """Join as `lease` does, but on no thread: who is called does not come, like one that has not woken up."""
    with pool._lock:
        return pool._join(urgency)


FAR = time.perf_counter_ns() + 10**15


@pytest.mark.parametrize(
    ("line", "newcomer", "goes_first"),
    [
        pytest.param([5], 5, True, id="an-equal-goes-before-who-has-not-woken-up"),
        pytest.param([5, 5, 5], 5, True, id="before-several-equals-too"),
        pytest.param([5], 6, False, id="the-less-urgent-never"),
        pytest.param([5], 4, True, id="the-more-urgent-always"),
        pytest.param([5, 6], 5, False, id="no-equal-where-priorities-differ"),
        pytest.param([(5, FAR)], 5, False, id="nobody-before-a-deadline"),
        pytest.param([5, (5, FAR), 5], 5, False, id="not-before-others-either-while-a-deadline-waits-behind-them"),
        pytest.param([], 5, True, id="nobody-waits"),
    ],
)
def test_who_goes_first_when_an_interpreter_is_free(
    pool: Pool, line: list[int | tuple[int, int]], newcomer: int, goes_first: bool
) -> None:
    held = pool.lease()
    for one in line:
        stand_in_line(pool, Urgency(*one) if isinstance(one, tuple) else Urgency(one))
    pool.give_back(held)
    if goes_first:
        assert pool.lease(Urgency(newcomer), patience=0) is held
    else:
        with pytest.raises(NoneFree):
            pool.lease(Urgency(newcomer), patience=0)


def test_nobody_is_overtaken_more_often_than_allowed(pool: Pool) -> None:
    held = pool.lease()
    waiter = stand_in_line(pool)
    waiter.since = FAR  # it came just now, however slow this machine is
    for _ in range(OVERTAKINGS):
        pool.give_back(held)
        assert pool.lease(patience=0) is held
        assert waiter.model is None
    pool.give_back(held)
    assert waiter.model is held
    with pytest.raises(NoneFree):
        pool.lease(patience=0)


def test_nobody_is_overtaken_who_has_waited_for_long_enough(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "OVERTAKEN_NS", 0)
    held = pool.lease()
    first, second = stand_in_line(pool), stand_in_line(pool)
    pool.give_back(held)
    assert (first.model, second.model) == (held, None)


def test_who_was_called_and_overtaken_is_called_again(pool: Pool) -> None:
    held = pool.lease()
    line = Line(pool)
    line.join("waits", NORMAL)
    for _ in range(3):
        pool.give_back(held)
        held = pool.lease()
    pool.give_back(held)
    line.end()
    assert line.served == ["waits"]
    assert pool.waiting == 0


def test_who_leaves_the_line_passes_its_call_on(pool: Pool) -> None:
    held = pool.lease()
    first = stand_in_line(pool)
    line = Line(pool)
    line.join("second", NORMAL)
    pool.give_back(held)
    pool._leave_line(first)
    line.end()
    assert line.served == ["second"]


def test_who_comes_calls_the_next_where_two_interpreters_are_free() -> None:
    pool = Pool([Interpreter(), Interpreter()])
    with busy(pool) as line:
        line.join("one", NORMAL)
        line.join("other", NORMAL)
    assert sorted(line.served) == ["one", "other"]
    assert pool.waiting == 0


@pytest.mark.parametrize("refusal", [QueueFull("full"), TurnedAway("it hangs")], ids=str)
def test_who_was_called_may_still_be_refused(refusal: TurnedAway) -> None:
    pool = Pool([Interpreter()], limit=2)
    held = pool.lease()
    waiter = stand_in_line(pool)
    pool.give_back(held)
    if isinstance(refusal, QueueFull):
        pool.lease(Urgency(1))
        stand_in_line(pool, Urgency(1))
    else:
        pool.fail(refusal)
    assert type(waiter.refusal) is type(refusal)
    assert not waiter.gate.locked()


def test_many_equals_share_an_interpreter_and_all_are_served() -> None:
    pool = Pool([Interpreter()], limit=64)
    served = [0] * 6

    def ask(k: int) -> None:
        for _ in range(300):
            pool.give_back(pool.lease(), took_ns=1000)
            served[k] += 1

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(served))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [300] * 6 == served
    assert (pool.waiting, len(pool.empty())) == (0, 1)


def test_many_threads_share_two_interpreters_and_none_is_lost() -> None:
    pool = Pool([Interpreter(), Interpreter()], limit=64)
    most, now, lock = 0, 0, threading.Lock()

    def ask(seed: int) -> None:
        nonlocal most, now
        for k in range(200):
            model = pool.lease(Urgency(1 + (seed + k) % 10))
            with lock:
                now += 1
                most = max(most, now)
            with lock:
                now -= 1
            pool.give_back(model, took_ns=1000)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most <= 2
    assert (pool.waiting, len(pool.empty())) == (0, 2)
