"""How often somebody may try a password: tries per key within a span of time. Pure: ``now`` comes with each call.

Three kinds of keys, so that guessing is slow and yet nobody can lock another one out:

- an *address* has few tries a minute;
- a *name* has few tries in ten minutes from browsers that never logged in under it, whatever their addresses;
- a *browser* that has logged in under a name before counts by itself, and the two others do not bind it.

So whoever hammers at a name can at most keep *new* browsers of that user waiting.
"""

from collections import deque
from dataclasses import dataclass, field

MINUTE = 60_000  # ms
MAX_KEYS = 10_000  # remembered
Key = tuple[str, str]  # kind and whose


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """So many tries within a span of ms."""

    tries: int
    span: int


ALLOWANCES = {
    "address": Allowance(tries=5, span=MINUTE),
    "browser": Allowance(tries=5, span=MINUTE),
    "name": Allowance(tries=20, span=10 * MINUTE),
}


def keys_of(address: str, name: str, browser: str | None) -> tuple[Key, ...]:
    """Return under which keys a try counts. ``browser``: proven to have logged in under the name before."""
    if browser is not None:
        return (("browser", browser),)
    return (("address", address), ("name", name))


@dataclass(kw_only=True)
class Attempts:
    """The tries that still count. Not thread-safe."""

    tries: dict[Key, deque[int]] = field(default_factory=dict)

    def wait(self, keys: tuple[Key, ...], now: int) -> int:
        """Return how many ms must pass before the next try under these keys; 0: it may be made."""
        return max(self._wait(key, now) for key in keys)

    def count(self, keys: tuple[Key, ...], now: int) -> None:
        """Note a try."""
        if len(self.tries) > MAX_KEYS:
            self._forget(now)
        for key in keys:
            self.tries.setdefault(key, deque(maxlen=ALLOWANCES[key[0]].tries)).append(now)

    def take_back(self, keys: tuple[Key, ...]) -> None:
        """Forget the newest try: the password was right."""
        for key in keys:
            if self.tries.get(key):
                self.tries[key].pop()

    def _wait(self, key: Key, now: int) -> int:
        allowance, tries = ALLOWANCES[key[0]], self.tries.get(key)
        if not tries or len(tries) < allowance.tries:
            return 0
        return max(0, allowance.span - (now - tries[0]))

    def _forget(self, now: int) -> None:
        """Drop keys whose tries are all over; when that is not enough, the ones that were noted first."""
        over = [key for key, tries in self.tries.items() if not tries or now - tries[-1] >= ALLOWANCES[key[0]].span]
        for key in over or list(self.tries)[: MAX_KEYS // 10]:
            del self.tries[key]
