"""The docs' links work, the tour's table of the core is up to date, and the tour's code prints what the tour says."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors_of(page: Path) -> list[str]:
    """Return the anchors of a page's headings on GitHub."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_the_docs_lead_to_existing_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_tours_table_of_the_core_counts_lines() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    table = tour.partition("## The core")[2].partition("\n## ")[0]
    counted = {links: int(lines) for links, lines in re.findall(r"^\| (\[.+?) \| (\d+) \|", table, re.MULTILINE)}
    assert len(counted) > 8
    for links, number in counted.items():
        files = [ROOT / "docs" / link for link in re.findall(r"\]\((.+?)\)", links)]
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert abs(number - lines) <= 15, f"{links} has {lines} lines, not {number}"


def test_the_tours_code_finds_its_image_where_the_tour_says(capsys: pytest.CaptureFixture[str]) -> None:
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    _, code, after = re.split("```(?:python)?\n", tour)
    exec(code, {})
    assert capsys.readouterr().out == re.search(r"^    (step .+\n)", after, re.MULTILINE)[1]  # type: ignore[index]
