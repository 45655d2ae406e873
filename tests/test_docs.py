"""The docs' links lead somewhere, and the tour's table of the core is true."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors_of(page: Path) -> list[str]:
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_docs_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_tours_table_of_the_core_counts_its_files_lines() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    table = tour.partition("## The core")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\[.+?) \| (\d+) \|", table, re.MULTILINE)
    counted = {links: int(lines) for links, lines in rows}
    files = {links: [ROOT / "docs" / link for link in re.findall(r"\]\((.+?)\)", links)] for links in counted}
    lines = {links: sum(len(path.read_text().splitlines()) for path in files[links]) for links in counted}
    assert len(counted) > 8
    assert {links: abs(counted[links] - lines[links]) <= 15 for links in counted} == dict.fromkeys(counted, True)
