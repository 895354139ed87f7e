"""How long to wait before trying again: full-jitter back-off. Pure: the random number is passed in.

Full jitter (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015) spreads a fleet that lost its
server at the same moment evenly over the whole interval, where plain doubling would bring it back in waves.
"""

from dataclasses import dataclass

_MAX_DOUBLINGS = 62  # beyond this the ceiling was reached long ago; keeps the power of two small


@dataclass(frozen=True, kw_only=True)
class BackOff:
    """Bounds of the waiting time, in seconds."""

    first: float = 1.0  # the interval of the first retry is [0, first)
    ceiling: float = 60.0  # no interval is longer

    def delay(self, failures: int, chance: float) -> float:
        """Return the seconds to wait after ``failures`` failures in a row (≥ 1).

        ``chance`` is a random number in [0, 1).
        """
        return chance * self.interval(failures)

    def interval(self, failures: int) -> float:
        """Return the end of the interval that the delay is drawn from."""
        if failures < 1:
            return 0.0
        return min(self.ceiling, self.first * 2.0 ** min(failures - 1, _MAX_DOUBLINGS))


def after_failure(back_off: BackOff, failures: int, chance: float, retry_after: float | None = None) -> float:
    """Return the seconds to wait, never less than the server asked for with Retry-After.

    The jitter is added on top of ``retry_after``, because a server that sheds load tells everybody the same time.
    """
    jitter = back_off.delay(failures, chance)
    return jitter if retry_after is None else max(0.0, retry_after) + jitter


def spread(seconds: float, chance: float, share: float = 0.1) -> float:
    """Return a polling interval lengthened by up to ``share`` of it, so that devices drift apart."""
    return seconds * (1.0 + share * chance)
