"""When people are reminded of what expires."""

import pytest

from fleet_server.core.expiry import DAY_MS, remind

RENEW = "edgewarden keys renew"
CASES = {
    "a root with time": ("image-root", 300, ""),
    "a root just in time": ("image-root", 21, ""),
    "a root soon": (
        "image-root",
        20,
        "image-root expires in 20 days; sign it again with: edgewarden keys renew image-root --keys KEYS",
    ),
    "a family that expired": (
        "vision",
        -3,
        f"vision expired 3 days ago, nothing new installs; sign it again with: {RENEW} vision --keys KEYS",
    ),
    "what the server renews, in time": ("image-timestamp", 3, ""),
    "what the server should have renewed": (
        "image-timestamp",
        1,
        "image-timestamp expires in 1 days; the server renews it by itself: look into its log",
    ),
}


@pytest.mark.parametrize(("role", "days", "warning"), CASES.values(), ids=CASES)
def test_people_are_reminded_in_time_with_the_command_that_helps(role: str, days: int, warning: str) -> None:
    now = 1_000 * DAY_MS
    reminder = remind(role, now + days * DAY_MS, now)
    assert (reminder.days_left, reminder.warning) == (days, warning)


def test_only_what_people_sign_has_a_command() -> None:
    assert remind("vision", 0, 0).command == "edgewarden keys renew vision --keys KEYS"
    assert remind("image-snapshot", 0, 0).command == ""
