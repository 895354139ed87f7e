"""When someone must sign again: days left of a role of the trust metadata, and the command that helps.

Pure. Knows how early people are reminded, and which roles the server renews by itself. Times are UTC ms.
"""

from dataclasses import dataclass

DAY_MS = 24 * 3600 * 1000
OFFLINE_WARN_DAYS = 21  # two people must find a day on which both are there
ONLINE_WARN_DAYS = 2  # of seven; renewed at half of that, so something is wrong by then
ONLINE_ROLES = frozenset({"image-snapshot", "image-timestamp"})


@dataclass(frozen=True, kw_only=True)
class Reminder:
    """What to tell people of one role. ``warning`` is empty while there is time enough."""

    days_left: int  # whole days; negative when it has expired
    warning: str
    command: str  # empty for what the server renews by itself


def remind(role: str, expires_at: int, now: int) -> Reminder:
    """Return how long a role lasts, and what to do about it."""
    days_left = (expires_at - now) // DAY_MS
    online = role in ONLINE_ROLES
    command = "" if online else f"edgewarden keys renew {role} --keys KEYS"
    late = days_left < (ONLINE_WARN_DAYS if online else OFFLINE_WARN_DAYS)
    return Reminder(days_left=days_left, warning=_warning(role, days_left, command) if late else "", command=command)


def _warning(role: str, days_left: int, command: str) -> str:
    when = f"expires in {days_left} days"
    if days_left < 0:
        when = f"expired {-days_left} days ago, nothing new installs"
    if not command:
        return f"{role} {when}; the server renews it by itself: look into its log"
    return f"{role} {when}; sign it again with: {command}"
