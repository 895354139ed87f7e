"""Figures and states in words, for people. Pure; every function takes what it needs, ``now`` included.

A state is never colour alone: it has a mark, a word and a tone. Tones are CSS classes.
"""

from dataclasses import dataclass
from datetime import datetime, timezone

from fleet_server.api_types import ModelOnDevice
from fleet_server.core.care import say_terms
from protocol.messages import Resources
from protocol.metrics import Proportion
from protocol.states import DeploymentState, EventKind, PresenceState, RejectReason

NOTHING = "–"
_SECOND, _MINUTE, _HOUR, _DAY = 1000, 60_000, 3_600_000, 86_400_000  # ms
_MILLISECOND, _WHOLE_SECOND = 1_000, 1_000_000  # µs
_KB = 1024
_LAST_TIME = 253_402_300_799_000  # ms; the end of year 9999, as far as calendars go


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How a state is shown."""

    sign: str
    word: str
    tone: str  # good, busy, warn, bad, quiet


PRESENCE = {
    PresenceState.NEW: Mark(sign="○", word="new", tone="quiet"),
    PresenceState.ONLINE: Mark(sign="●", word="online", tone="good"),
    PresenceState.STALE: Mark(sign="◐", word="stale", tone="warn"),
    PresenceState.OFFLINE: Mark(sign="○", word="offline", tone="quiet"),
    PresenceState.LOST: Mark(sign="✕", word="lost", tone="bad"),
    PresenceState.REVOKED: Mark(sign="⊘", word="revoked", tone="bad"),
}
DEPLOYMENT = {
    DeploymentState.IDLE: Mark(sign="·", word="idle", tone="quiet"),
    DeploymentState.VERIFIED: Mark(sign="→", word="verified", tone="busy"),
    DeploymentState.DOWNLOADING: Mark(sign="↓", word="downloading", tone="busy"),
    DeploymentState.STAGED: Mark(sign="→", word="staged", tone="busy"),
    DeploymentState.SELFTEST: Mark(sign="→", word="self-test", tone="busy"),
    DeploymentState.SHADOW: Mark(sign="◑", word="in the shadow", tone="busy"),
    DeploymentState.SWAPPING: Mark(sign="→", word="swapping", tone="busy"),
    DeploymentState.PROBATION: Mark(sign="◔", word="on probation", tone="busy"),
    DeploymentState.COMMITTED: Mark(sign="✓", word="committed", tone="good"),
    DeploymentState.ROLLING_BACK: Mark(sign="↺", word="rolling back", tone="warn"),
    DeploymentState.ROLLED_BACK: Mark(sign="↺", word="rolled back", tone="bad"),
    DeploymentState.FAILED: Mark(sign="✕", word="failed", tone="bad"),
    DeploymentState.REJECTED: Mark(sign="✕", word="rejected", tone="bad"),
    DeploymentState.SUPERSEDED: Mark(sign="·", word="superseded", tone="quiet"),
}
REASON = {
    RejectReason.BAD_SIGNATURE: "not signed by the keys that must",
    RejectReason.REPLAYED: "older than what the device had accepted",
    RejectReason.EXPIRED: "its signed metadata has expired",
    RejectReason.MALFORMED: "not what a sound server sends",
    RejectReason.INCOMPLETE: "a part is missing",
    RejectReason.WRONG_DEVICE: "signed for another device",
    RejectReason.NOT_RELEASED: "the release team did not release it",
    RejectReason.DISAGREEMENT: "not what the release team signed",
    RejectReason.BELOW_FLOOR: "below the floor of this model",
    RejectReason.YANKED: "yanked by the release team",
    RejectReason.HASH_MISMATCH: "the bytes are not the signed ones",
    RejectReason.BAD_BUNDLE: "the bundle is broken",
    RejectReason.WRONG_RELEASE: "the bundle names another release than was signed",
    RejectReason.DOES_NOT_FIT: "does not fit this device",
    RejectReason.SELFTEST_FAILED: "failed its trial on the device",
    RejectReason.NO_SPACE: "no space on the disk",
    RejectReason.UNREACHABLE: "could not be downloaded",
    RejectReason.SWAP_FAILED: "the data plane could not take it up",
    RejectReason.CRASHED_IN_PROBATION: "the data plane died while it was on probation",
    RejectReason.INTERRUPTED: "power was lost too often while it was on probation",
    RejectReason.SHADOW_FAILED: "answered too differently in the shadow",
    RejectReason.TOO_MANY_ERRORS: "failed too many requests on probation",
    RejectReason.TOO_SLOW: "much slower than the version before",
    RejectReason.CONFIDENCE_COLLAPSED: "much less sure than the version before",
    RejectReason.GOLDEN_FAILED: "its golden samples do not agree where it serves",
    RejectReason.LOOPING: "too many orders within an hour; left alone for an hour",
    RejectReason.TAKEN_BACK: "taken back by a person at the device",
}
KIND = {
    EventKind.DEPLOYMENT: "update",
    EventKind.REFUSED: "refused",
    EventKind.DATA_PLANE: "inference",
    EventKind.SPOOL: "spool",
    EventKind.AGENT: "agent",
    EventKind.GOVERNOR: "distress",
}


def presence(state: PresenceState) -> Mark:
    """Return how a presence is shown."""
    return PRESENCE[state]


def deployment(state: DeploymentState) -> Mark:
    """Return how an update's state is shown."""
    return DEPLOYMENT[state]


def kind(value: EventKind) -> str:
    """Return the word for a kind of event."""
    return KIND[value]


def reason(value: RejectReason | None) -> str:
    """Return a reason as words."""
    return REASON.get(value, value.value.replace("-", " ")) if value else ""


def sentences(model: ModelOnDevice) -> list[str]:
    """Return how careful the order for a model is, how its shadow went, and what its newest step says."""
    said = (say_terms(model.shadow, forced=model.forced), model.shadow_verdict, model.detail)
    return [sentence for sentence in dict.fromkeys(said) if sentence]


def percent(proportion: Proportion | None) -> str:
    """Return a share as a percentage.

    >>> percent(Proportion(successes=9, n=10, value=0.9, low=0.6, high=0.98))
    '90.0 %'
    """
    return NOTHING if proportion is None or proportion.value is None else f"{100 * proportion.value:.1f} %"


def evidence(proportion: Proportion | None) -> str:
    """Return what a share rests on: its 95 % interval and sample size.

    >>> evidence(Proportion(successes=9, n=10, value=0.9, low=0.596, high=0.982))
    '59.6–98.2 %, n = 10'
    """
    if proportion is None or proportion.low is None or proportion.high is None:
        return ""
    return f"{100 * proportion.low:.1f}–{100 * proportion.high:.1f} %, n = {count(proportion.n)}"


def latency(microseconds: float | None) -> str:
    """Return a duration with a fitting unit.

    >>> latency(1234.0), latency(87.2), latency(2_500_000.0), latency(None)
    ('1.23 ms', '87 µs', '2.50 s', '–')
    """
    if microseconds is None:
        return NOTHING
    if microseconds < _MILLISECOND:
        return f"{microseconds:.0f} µs"
    if microseconds < _WHOLE_SECOND:
        return f"{microseconds / _MILLISECOND:.3g} ms"
    return f"{microseconds / _WHOLE_SECOND:.2f} s"


def size(bytes_: int | None) -> str:
    """Return a size with a binary unit.

    >>> size(512), size(40_000), size(3_000_000), size(None)
    ('512 B', '39 KiB', '2.9 MiB', '–')
    """
    if bytes_ is None:
        return NOTHING
    if bytes_ < _KB:
        return f"{bytes_} B"
    if bytes_ < _KB**2:
        return f"{bytes_ / _KB:.0f} KiB"
    if bytes_ < _KB**3:
        return f"{bytes_ / _KB**2:.{0 if bytes_ >= 100 * _KB**2 else 1}f} MiB"
    return f"{bytes_ / _KB**3:.1f} GiB"


def count(number: int) -> str:
    """Return a whole number with thin spaces between thousands.

    >>> count(1234567).replace(chr(0x202f), "_")
    '1_234_567'
    """
    return f"{number:,}".replace(",", "\u202f")


def turned_away(dropped: int, late: int, shed: int) -> str:
    """Return how many requests were not taken, and what is known of why.

    >>> turned_away(9, 4, 0)
    '9 turned away, 4 of them late'
    """
    parts = [f"{count(n)} of them {why}" for n, why in ((late, "late"), (shed, "in distress")) if n]
    return ", ".join([f"{count(dropped)} turned away", *parts])


def cpu(resources: Resources | None) -> str:
    """Return the processor load."""
    return NOTHING if resources is None or resources.cpu is None else f"{resources.cpu / 10:.0f} %"


def memory(resources: Resources | None) -> str:
    """Return memory in use, of how much."""
    if resources is None or resources.memory is None:
        return NOTHING
    total = f" of {size(resources.memory_total)}" if resources.memory_total else ""
    return f"{size(resources.memory)}{total}"


def readings(resources: Resources) -> dict[str, str]:
    """Return what a device says of its machine; a sensor that is missing is not mentioned."""
    named = {
        "CPU": cpu(resources) if resources.cpu is not None else None,
        "Memory": memory(resources) if resources.memory is not None else None,
        "Agent memory": _size_or_none(resources.control_rss),
        "Inference memory": _size_or_none(resources.data_plane_rss),
        "Network in": _size_or_none(resources.network_in),
        "Network out": _size_or_none(resources.network_out),
        "Free disk": _size_or_none(resources.disk_free),
        "Temperature": f"{resources.temperature / 10:.1f} °C" if resources.temperature is not None else None,
    }
    return {name: value for name, value in named.items() if value is not None}


def ago(at: int | None, now: int) -> str:
    """Return how long ago something was.

    >>> ago(0, 1_000), ago(0, 65_000), ago(0, 7_300_000), ago(0, 200_000_000), ago(None, 5)
    ('just now', '1 min ago', '2 h ago', '2 d ago', 'never')
    """
    if at is None:
        return "never"
    passed = max(0, now - at)
    if passed < 5 * _SECOND:
        return "just now"
    if passed < _MINUTE:
        return f"{passed // _SECOND} s ago"
    if passed < _HOUR:
        return f"{passed // _MINUTE} min ago"
    if passed < 2 * _DAY:
        return f"{passed // _HOUR} h ago"
    return f"{passed // _DAY} d ago"


def iso(at: int) -> str:
    """Return a time as ISO 8601 in UTC, for ``<time datetime>``."""
    return _time(at).strftime("%Y-%m-%dT%H:%M:%SZ")


def clock(at: int, now: int) -> str:
    """Return the time of day (UTC), with the date unless it is today's."""
    time, today = _time(at), _time(now)
    return time.strftime("%H:%M:%S" if time.date() == today.date() else "%Y-%m-%d %H:%M")


def _size_or_none(bytes_: int | None) -> str | None:
    return None if bytes_ is None else size(bytes_)


def _time(at: int) -> datetime:
    return datetime.fromtimestamp(min(max(at, 0), _LAST_TIME) / 1000, timezone.utc)
