"""Which version a rollback without a number goes to."""

from collections.abc import Sequence

import pytest

from fleet_server.core.history import version_before

CASES: list[tuple[str, Sequence[int], int | None, int | None]] = [
    ("nothing was ever committed", [], 3, None),
    ("nothing was ever committed or wanted", [], None, None),
    ("the first version has none before it", [1], 1, None),
    ("one step back", [1, 2], 2, 1),
    ("a version that never committed goes back to the one that did", [1, 2], 3, 2),
    ("the model is not wanted any more: what ran last", [1, 2], None, 2),
    ("after a rollback the next one goes further, not forward again", [1, 2, 3, 2], 2, 1),
    ("rolled back all the way", [1, 2, 1], 1, None),
    ("rolled back, then forward again", [1, 2, 1, 2], 2, 1),
    ("rolled back, then a new one failed", [1, 2, 1], 3, 1),
    ("committed again without a change", [1, 2, 2, 2], 2, 1),
    ("a rollback over two steps drops both", [1, 2, 3, 1, 4], 4, 1),
    ("wanted is older than the top: it was ordered, not yet committed", [1, 2], 1, 2),
]


@pytest.mark.parametrize(("committed", "wanted", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_version_before(committed: Sequence[int], wanted: int | None, expected: int | None) -> None:
    assert version_before(committed, wanted) == expected
