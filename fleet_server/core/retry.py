"""How long to wait before trying again. Pure: whoever wants jitter passes it in."""

FIRST_WAIT = 0.2  # seconds
LONGEST_WAIT = 10.0  # seconds; a database that came back is found within this time


def backoff(tries: int) -> float:
    """Return the seconds to wait after the n-th failure in a row: doubling, with an upper bound."""
    return float(min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(tries - 1, 16)))
