"""Every test that the page of pains names exists, and every pain has one."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
ROWS = [
    line for line in (ROOT / "docs" / "explanation" / "pains.md").read_text().splitlines() if line.startswith("| **")
]


def test_the_tests_that_the_page_names_exist() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE))
    assert set() == {name for row in ROWS for name in re.findall(r"`(test_\w+)`", row)} - defined


def test_every_pain_has_an_answer_and_a_test() -> None:
    for row in ROWS:
        _, pain, answer, tests, _ = (cell.strip() for cell in row.split("|"))
        assert pain
        assert answer
        assert "`test_" in tests, pain


def test_the_stories_named_after_pains_are_all_on_the_page() -> None:
    stories = (ROOT / "tests" / "unit" / "agent_core" / "test_pains_device.py").read_text()
    told = "\n".join(ROWS)
    assert [] == [name for name in re.findall(r"^def (test_\w+)\(", stories, re.MULTILINE) if f"`{name}`" not in told]
