"""Documentation holds together: every relative link leads somewhere, no page knows the machine it was made on."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:")  # https:, mailto:
MACHINE = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp/w|tmp/pytest)\b|\bpytest-of-")


def pages() -> list[Path]:
    """Return every Markdown file that belongs to the project."""
    known = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for name in known.stdout.splitlines() if (path := ROOT / name).exists()]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, made as code hosts make them."""
    found: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text())):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 1
        while anchor in found:
            anchor, number = f"{anchor.removesuffix(f'-{number - 1}')}-{number}", number + 1
        found.add(anchor)
    return found


def broken(page: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    return [link for link in LINK.findall(text) if not ELSEWHERE.match(link) and not _leads_somewhere(page, link)]


def _leads_somewhere(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or not target.is_relative_to(ROOT):
        return False
    return not anchor or (target.suffix == ".md" and anchor in anchors(target))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert [] == broken(page)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_names_a_path_of_the_machine_it_was_written_on(page: Path) -> None:
    lines = page.read_text().splitlines()
    assert [] == [line for line in lines if MACHINE.search(line)]


@pytest.mark.parametrize(
    ("text", "leads"),
    [
        ("[a](README.md)", True),
        ("[a](README.md#by-reader)", True),
        ("[a](#by-kind)", True),
        ("[a](README.md#no-such-heading)", False),
        ("[a](no-such-page.md)", False),
        ("[a](https://example.org/no-such-page)", True),
        ("`[a](no-such-page.md)`", True),
    ],
)
def test_a_link_that_leads_nowhere_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, leads: bool
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "README.md").write_text("# A\n## By reader\n")
    page = tmp_path / "page.md"
    page.write_text(f"## By kind\n{text}\n")
    assert leads == (not broken(page))


def test_every_page_of_the_documentation_is_in_its_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    below = [
        path
        for kind in ("tutorial", "how-to", "reference", "explanation")
        for path in (ROOT / "docs" / kind).glob("*.md")
    ]
    assert [] == [path.name for path in below if f"({path.parent.name}/{path.name})" not in index]
