"""Kills the agent at every moment at which its disk changes, and starts it again: `make soak-crash`.

Each story (an update, a rollback, an enrolment, …) is told once on the real adapters while `crash_journal.py` records
every operation on the state folder. For each moment, and each kind of fault, the disk is built that would be left,
an agent is started on it, goes on to the end, and `crash_stories.py` says what is wrong. A failing moment says how to
look at it alone. The last line is JSON; the exit code is 1 when anything is wrong.
"""

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parent / "unit" / "agent_adapters")]

import crash_stories  # noqa: E402 - the project is found first
from crash_journal import MODES, Moment, lay_out, moments, recording  # noqa: E402 - as above
from crash_world import Fleet, far_ends  # noqa: E402 - as above

IN_MEMORY = Path("/dev/shm")
SHOWN = 50  # failures that are told in full


@dataclass
class Row:
    """What came of one kind of moment in one story."""

    points: int = 0
    passed: int = 0
    worst_ms: float = 0.0


@dataclass
class Outcome:
    """What came of a sweep."""

    rows: dict[tuple[str, str], Row] = field(default_factory=dict)  # by story and operation
    modes: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def points(self) -> int:
        return sum(row.points for row in self.rows.values())

    @property
    def worst_ms(self) -> float:
        return max((row.worst_ms for row in self.rows.values()), default=0.0)

    def add(self, story: str, moment: Moment, problems: Sequence[str], took_ms: float) -> None:
        row = self.rows.setdefault((story, moment.kind), Row())
        row.points += 1
        row.passed += not problems
        row.worst_ms = max(row.worst_ms, took_ms)
        self.modes[moment.mode] = self.modes.get(moment.mode, 0) + 1
        if problems:
            said = "; ".join(problems[:3])
            self.failures.append(f"--only {story}:{moment.name}  (after {moment.after}) {said}")


@contextmanager
def workplace() -> Iterator[Path]:
    """Yield a folder, in memory where the machine has such a place; it goes away, whatever happens."""
    place = str(IN_MEMORY) if os.access(IN_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="crash-sweep-", dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def record(story: crash_stories.Story, place: Path) -> list[Moment]:
    """Tell a story once; return all its moments."""
    state = place / "state"
    shutil.rmtree(place, ignore_errors=True)
    state.mkdir(parents=True)
    story.prepare(state)
    with recording(state) as recorder:
        story.tell(state, place / "scratch", recorder)
    return list(moments(recorder))


def try_moment(story: crash_stories.Story, moment: Moment, place: Path) -> tuple[list[str], float]:
    """Start an agent on what a moment leaves; return what is wrong, and how long it took until all was right (ms)."""
    state = place / "restarted"
    shutil.rmtree(state, ignore_errors=True)
    lay_out(moment.image, state)
    began = time.perf_counter()
    try:
        problems = story.go_on(state, place / "scratch", moment)
    except Exception as error:  # noqa: BLE001 - an agent that cannot go on, for whatever reason, is what is looked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        problems = [f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"]
    return problems, (time.perf_counter() - began) * 1000


def sweep(
    names: Sequence[str],
    *,
    sample: int = 0,
    only: str = "",
    seed: int = 0,
    tell: Callable[[str, int, int], None] = lambda _story, _done, _all: None,
) -> Outcome:
    """Try every moment of these stories, or ``sample`` of each, drawn by ``seed``."""
    outcome, dice = Outcome(), random.Random(seed)
    with workplace() as place, far_ends() as (book, authority):
        for name in names:
            story = crash_stories.story(name, lambda: Fleet(book, authority))
            chosen = _choose(record(story, place / name), sample, only, dice)
            for done, moment in enumerate(chosen):
                tell(name, done, len(chosen))
                outcome.add(name, moment, *try_moment(story, moment, place / name))
            tell(name, len(chosen), len(chosen))
    return outcome


def _choose(found: list[Moment], sample: int, only: str, dice: random.Random) -> list[Moment]:
    if only:
        return [moment for moment in found if moment.name == only]
    if sample and sample < len(found):
        return sorted(dice.sample(found, sample), key=lambda moment: moment.number)
    return found


# ---------------------------------------------------------------- for people
def _bar(story: str, done: int, every: int) -> None:
    if sys.stderr.isatty():
        filled = 30 * done // max(1, every)
        end = "\n" if done == every else ""
        sys.stderr.write(f"\r{story:16} [{'#' * filled}{'.' * (30 - filled)}] {done}/{every} {end}")
        sys.stderr.flush()
    elif done == every:
        sys.stderr.write(f"{story}: {done} moments\n")


def table(outcome: Outcome) -> str:
    """Return the table: story, operation, points, passed, worst recovery."""
    lines = [f"{'story':16} {'operation':10} {'points':>7} {'passed':>7} {'worst ms':>9}"]
    for (story, kind), row in sorted(outcome.rows.items()):
        lines.append(f"{story:16} {kind:10} {row.points:7d} {row.passed:7d} {row.worst_ms:9.0f}")
    passed = sum(row.passed for row in outcome.rows.values())
    lines.append(f"{'all':16} {'':10} {outcome.points:7d} {passed:7d} {outcome.worst_ms:9.0f}")
    return "\n".join(lines)


def main() -> int:
    """Sweep as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stories", nargs="*", metavar="STORY", help=f"of {', '.join(crash_stories.names())}")
    parser.add_argument("--only", default="", metavar="STORY:POINT", help="one moment alone, with the agent's log")
    parser.add_argument("--sample", type=int, default=0, help="moments of each story; all unless said")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--kills", type=int, default=0, help="also SIGKILL a real agent so often")
    given = parser.parse_args()
    story, _, point = given.only.partition(":")
    stories = [story] if story else given.stories or crash_stories.names()
    if unknown := [name for name in stories if name not in crash_stories.names()]:
        parser.error(f"no such story: {', '.join(unknown)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is in memory goes away then, too
    logging.basicConfig(level=logging.DEBUG if story else logging.CRITICAL + 1)
    try:
        outcome = sweep(stories, sample=given.sample, only=point, seed=given.seed, tell=_bar)
        kills = 0 if given.only else given.kills
        wrong, took = _kill(kills, given.seed) if kills else ([], [])
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; nothing is left behind\n")
        return 130
    if given.only and not outcome.points:
        print(f"{given.only} is no moment of its own: nothing changed with it, or the story has no such point")
    print(table(outcome))
    if took:
        print(f"{'real kills':16} {'SIGKILL':10} {kills:7d} {kills - len(wrong):7d} {max(took):9.0f}")
    for failure in outcome.failures[:SHOWN]:
        print(f"FAILED {failure}")
    for failure in wrong:
        print(f"FAILED {failure}")
    said = {mode: outcome.modes.get(mode, 0) for mode in MODES}
    summary = {"points": outcome.points, "failed": len(outcome.failures), "worst_ms": round(outcome.worst_ms), **said}
    real = {"kills": kills, "failed_kills": len(wrong), "worst_kill_ms": round(max(took, default=0))}
    print(json.dumps({"crash_sweep": {**summary, **real}}))
    return 1 if outcome.failures or wrong or not outcome.points else 0


def _kill(rounds: int, seed: int) -> tuple[list[str], list[float]]:
    """Kill a real agent; a fleet that does not come back is told as a failure too."""
    from crash_kills import kill_rounds

    from demo.world import NotObserved

    with tempfile.TemporaryDirectory(prefix="crash-kills-") as folder:
        try:
            return kill_rounds(Path(folder) / "fleet", rounds, seed, lambda done, every: _bar("kills", done, every))
        except NotObserved as error:
            return [str(error)], []


if __name__ == "__main__":
    sys.exit(main())
