"""Files of the Director repository by the names that TUF clients ask for."""

import re
from collections.abc import Sequence

from fleet_server.ports import SignedDesire

_DIRECTOR_FILE = re.compile(r"(?:([1-9][0-9]{0,9})\.)?(root|timestamp|snapshot|targets)\.json")


def director_file(name: str, roots: Sequence[bytes], desire: SignedDesire | None) -> bytes | None:
    """Return a file of one device's Director repository, by its plain or numbered name."""
    match = _DIRECTOR_FILE.fullmatch(name)
    if match is None:
        return None
    number, role = int(match[1] or 0), match[2]
    if role == "root":
        return roots[number - 1] if 1 <= number <= len(roots) else None
    if desire is None or number not in (0, desire.version):
        return None
    files = {"timestamp": desire.timestamp, "snapshot": desire.snapshot, "targets": desire.targets}
    return files[role]
