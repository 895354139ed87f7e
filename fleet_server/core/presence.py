"""Is a device there? Derived from births, farewells, wills and the time it was last heard. Pure.

Knows the rules and nothing of MQTT or the database. The rules:

- A connection is numbered by the device, and the number grows for ever. A farewell or will ends its own connection
  and those before it, never a newer one: a broker publishes wills late, and all at once when it is stopped.
- The newest birth stands, whatever the order of arrival. A lower number under another spool and boot is a device
  that was installed anew, and starts over.
- A will is no proof of death: a broker stopped by SIGTERM publishes the will of every device, and one killed
  publishes none. So what was heard since counts more.
- Silence is judged on the server's clock alone; the device's may be wrong.
"""

from dataclasses import dataclass

from protocol.messages import Birth, DeviceState, Farewell, Report
from protocol.states import PresenceState

STALE_AFTER_REPORTS = 3  # this many report intervals without a word
DEFAULT_INTERVAL = 60_000  # ms, the agent's default window
SHORTEST_INTERVAL = 5_000  # ms; with 2 s windows, one late report is not silence
LONGEST_INTERVAL = 15 * 60_000  # ms; a claim of weeks must not hide a dead device


@dataclass(frozen=True, kw_only=True)
class Connection:
    """What births, farewells and wills have said of a device so far."""

    birth: Birth | None = None  # of the newest connection
    ended: int = 0  # highest connection number that a farewell or will has ended
    goodbye: bool = False  # that end was a farewell
    ended_at: int = 0  # server's UTC ms

    @property
    def connected(self) -> bool:
        """Whether the newest connection has not ended, as far as anybody said."""
        return self.birth is not None and self.birth.connection > self.ended


def hear(before: Connection, message: DeviceState, at: int) -> Connection:
    """Return what is known after one more message, received at ``at`` (server's UTC ms)."""
    if isinstance(message, Birth):
        return _hear_birth(before, message)
    goodbye = isinstance(message, Farewell)
    if not _ends(before, message.connection, message.boot, goodbye=goodbye):
        return before
    return Connection(birth=before.birth, ended=message.connection, goodbye=goodbye, ended_at=at)


def state_of(
    connection: Connection, *, last_seen: int | None, now: int, interval: int, revoked: bool = False
) -> PresenceState:
    """Say what to believe of a device at ``now``, when it reports every ``interval`` ms."""
    if revoked:
        return PresenceState.REVOKED
    if last_seen is None:
        return PresenceState.NEW
    fresh = now - last_seen <= STALE_AFTER_REPORTS * interval
    if connection.connected or not connection.ended:
        return PresenceState.ONLINE if fresh else PresenceState.STALE
    if connection.goodbye:
        return PresenceState.OFFLINE
    heard_since = last_seen > connection.ended_at
    return PresenceState.ONLINE if fresh and heard_since else PresenceState.LOST


def interval_of(report: Report) -> int | None:
    """Return how often a device reports, judged by one report; None when the report does not tell.

    A report that covers several is made of a backlog and says nothing of the rhythm.
    """
    if report.covers > 1 or not report.windows:
        return None
    span = sum(window.span for window in report.windows)
    return min(LONGEST_INTERVAL, max(SHORTEST_INTERVAL, span))


def _hear_birth(before: Connection, birth: Birth) -> Connection:
    known = before.birth
    if known is None or birth.connection >= known.connection:
        return Connection(birth=birth, ended=before.ended, goodbye=before.goodbye, ended_at=before.ended_at)
    if birth.spool != known.spool and birth.boot != known.boot:
        return Connection(birth=birth)
    return before


def _ends(before: Connection, connection: int, boot: str, *, goodbye: bool) -> bool:
    """Say whether a farewell or will adds something: it is for the newest connection, or a later one."""
    known = before.birth
    if known is not None and connection == known.connection and boot != known.boot:
        return False
    newest = max(before.ended, known.connection if known else 0)
    if connection == before.ended:
        return goodbye and not before.goodbye
    return connection >= newest
