"""Which commands a device carries out: a table of named cases, and what it remembers of them."""

from dataclasses import dataclass

import pytest

from agent.core.commands import (
    REMEMBERED,
    Accepted,
    Ledger,
    Refused,
    Remembered,
    Repeated,
    accept,
    end,
    judge,
    resume,
    tell,
    untold,
)
from protocol.commands import MAX_LIFE_MS, Command, RestartDataPlaneCommand
from protocol.states import CommandOutcome, RejectReason

NOW = 1_790_000_000_000
MINUTE = 60_000
FIVE = Remembered(id="five", sequence=5, outcome=CommandOutcome.DONE, detail="fine", told=True)
SEVEN = Remembered(id="seven", sequence=7)
LEDGER = Ledger(highest=7, commands=(FIVE, SEVEN))


def command(id_: str = "new", sequence: int = 8, **changes: object) -> Command:
    facts: dict[str, object] = {
        "device": "cam-7",
        "id": id_,
        "sequence": sequence,
        "issued": NOW,
        "expires": NOW + MINUTE,
        "command": RestartDataPlaneCommand(),
    }
    return Command(**(facts | changes))  # type: ignore[arg-type]  # facts of the case


@dataclass(frozen=True)
class Case:
    command: Command
    expected: str | RejectReason | Remembered  # "accepted", why it is refused, or what is known of it
    at: int = NOW
    ledger: Ledger = LEDGER


CASES = {
    "the next sequence": Case(command(), "accepted"),
    "a gap in the sequence": Case(command(sequence=1_000_000), "accepted"),
    "the first command ever": Case(command(sequence=1), "accepted", ledger=Ledger()),
    "the same again, after it was done": Case(command("five", 5), FIVE),
    "the same again, while it is under way": Case(command("seven", 7), SEVEN),
    "the same again, long after it expired": Case(command("five", 5), FIVE, at=NOW + 10 * MINUTE),
    "an older one that was held back on the way": Case(command("six", 6), RejectReason.REPLAYED),
    "the newest sequence under another id": Case(command("other", 7), RejectReason.REPLAYED),
    "a known id under a new sequence": Case(command("five", 9), RejectReason.REPLAYED),
    "a known id under an older sequence": Case(command("seven", 3), RejectReason.REPLAYED),
    "the moment that it expires": Case(command(), RejectReason.EXPIRED, at=NOW + MINUTE),
    "a moment before it expires": Case(command(), "accepted", at=NOW + MINUTE - 1),
    "expired and held back": Case(command("six", 6), RejectReason.EXPIRED, at=NOW + MINUTE),
    "issued in the future: this clock is behind": Case(command(), "accepted", at=NOW - 300 * MINUTE),
    "a clock of 1970 that is not yet behind a floor": Case(command(), "accepted", at=1),
    "for another device": Case(command(device="cam-8"), RejectReason.WRONG_DEVICE),
    "for another device, with a known id": Case(command("five", 5, device="cam-8"), RejectReason.WRONG_DEVICE),
    "expires before it is issued": Case(command(expires=NOW - 1), RejectReason.MALFORMED, at=NOW - MINUTE),
    "lives for just a day": Case(command(expires=NOW + MAX_LIFE_MS), "accepted"),
    "lives for more than a day": Case(command(expires=NOW + MAX_LIFE_MS + 1), RejectReason.MALFORMED),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_what_is_done_about_a_command(case: Case) -> None:
    found = judge(case.ledger, case.command, device="cam-7", at=case.at)
    if isinstance(case.expected, Remembered):
        assert Repeated(known=case.expected) == found
    elif isinstance(case.expected, RejectReason):
        assert isinstance(found, Refused)
        assert case.expected is found.reason
        assert found.detail
    else:
        assert Accepted() == found


def test_what_was_accepted_never_counts_as_new_again() -> None:
    ledger = accept(LEDGER, command())
    assert 8 == ledger.highest
    assert isinstance(judge(ledger, command(), device="cam-7", at=NOW), Repeated)


def test_the_oldest_make_place_and_still_never_count_again() -> None:
    ledger = Ledger()
    for sequence in range(1, REMEMBERED + 2):
        ledger = accept(ledger, command(f"c{sequence}", sequence))
    assert REMEMBERED == len(ledger.commands)
    found = judge(ledger, command("c1", 1), device="cam-7", at=NOW)
    assert isinstance(found, Refused)
    assert RejectReason.REPLAYED is found.reason


def test_an_outcome_is_told_once() -> None:
    ledger = end(LEDGER, "seven", CommandOutcome.FAILED, "it did not agree")
    (waiting,) = untold(ledger)
    assert ("seven", CommandOutcome.FAILED, "it did not agree") == (waiting.id, waiting.outcome, waiting.detail)
    assert () == untold(tell(ledger, "seven"))


RESUMED = {
    "nothing was ever asked": (Ledger(), {}),
    "all was done and told": (Ledger(highest=5, commands=(FIVE,)), {}),
    "the power went between remembering and acting": (LEDGER, {"seven": CommandOutcome.INTERRUPTED}),
    "the power went between acting and the outcome": (LEDGER, {"seven": CommandOutcome.INTERRUPTED}),
    "the power went between the outcome and the reply": (
        end(LEDGER, "seven", CommandOutcome.DONE, "fine"),
        {"seven": CommandOutcome.DONE},
    ),
    "the power went between the reply and its note": (
        end(LEDGER, "seven", CommandOutcome.DONE, "fine"),
        {"seven": CommandOutcome.DONE},
    ),
    "the power went after all": (tell(end(LEDGER, "seven", CommandOutcome.DONE, "fine"), "seven"), {}),
}


@pytest.mark.parametrize(("ledger", "expected"), RESUMED.values(), ids=list(RESUMED))
def test_what_a_start_tells_and_that_it_does_nothing_again(
    ledger: Ledger, expected: dict[str, CommandOutcome]
) -> None:
    resumed = resume(ledger)
    assert expected == {one.id: one.outcome for one in untold(resumed)}
    assert ledger.highest == resumed.highest
    assert all(one.outcome is not None for one in resumed.commands)
    assert resumed == resume(resumed)
