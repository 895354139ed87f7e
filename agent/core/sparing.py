"""When a second data plane waits beside the one that serves, ready to step in: facts in, a decision out.

A spare makes the way from a death to the next answer short, for it has imported everything. It costs memory, so it is
had where memory is plenty, started when nothing else is going on, and given up when memory becomes short.
"""

from dataclasses import dataclass
from enum import Enum

MIB = 1024 * 1024
AUTO_MEMORY = 960 * MIB  # a machine of "1 GB": the kernel keeps some of it for itself
ROOM_TO_START = 128 * MIB  # available memory; a spare takes about a fifth of it
ROOM_TO_STAY = 64 * MIB  # less than above, or a spare would come and go
CALM_SECONDS = 5.0  # since the last model was loaded: the caches are warm again, clients are served
HEALTHY_SECONDS = 60.0  # a data plane that lived this long owes nothing to the ones before
LOOK_SECONDS = 30.0  # between two looks at the memory
FIRST_BACKOFF_SECONDS = 5.0  # after a spare that died, doubling
MAX_BACKOFF_SECONDS = 600.0


class Step(Enum):
    """What to do about the spare now."""

    NOTHING = "nothing"
    START = "start"
    LET_GO = "let go"


@dataclass(frozen=True, kw_only=True)
class SpareFacts:
    """What is known when the question is asked; times in seconds of one clock."""

    now: float
    serves: bool  # there is a model whose clients would wait
    waits: bool  # there is a spare
    calm_since: float | None  # when the last model was loaded by an open data plane; None: things are going on
    calm: float = CALM_SECONDS  # how long nothing must have happened
    restarts: int = 0  # unexpected ends of data planes since the last healthy life
    failures: int = 0  # spares that died young, one after the other
    failed_at: float = 0.0
    available: int | None = None  # bytes of memory; None: the machine does not tell
    eased: bool = False  # the governor has models work less: nothing is added now
    short: bool = False  # and says that it is memory that is short


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do, and when to ask again; None: when something happens."""

    step: Step = Step.NOTHING
    again: float | None = None


def is_wanted(setting: str, memory_total: int) -> bool:
    """Tell whether this machine has a spare at all."""
    return setting == "on" or (setting == "auto" and memory_total >= AUTO_MEMORY)


def decide(facts: SpareFacts) -> Decision:
    """Return what to do about the spare."""
    if facts.waits:
        return _stay(facts)
    if not facts.serves or facts.calm_since is None or facts.eased:
        return Decision()
    due = max(facts.calm_since + _patience(facts), facts.failed_at + _backoff(facts.failures))
    if facts.now < due:
        return Decision(again=due)
    if facts.short or _is_short(facts.available, ROOM_TO_START):
        return Decision(again=facts.now + LOOK_SECONDS)
    return Decision(step=Step.START, again=facts.now + LOOK_SECONDS)


def _stay(facts: SpareFacts) -> Decision:
    needless = not facts.serves or facts.short or _is_short(facts.available, ROOM_TO_STAY)
    return Decision(step=Step.LET_GO if needless else Step.NOTHING, again=facts.now + LOOK_SECONDS)


def _patience(facts: SpareFacts) -> float:
    """After one death soon; where data planes die one after the other, not before one has lived."""
    return facts.calm if facts.restarts <= 1 else HEALTHY_SECONDS


def _backoff(failures: int) -> float:
    return min(MAX_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2.0 ** (min(failures, 20) - 1)) if failures else 0.0


def _is_short(available: int | None, room: int) -> bool:
    return available is not None and available < room
