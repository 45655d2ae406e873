"""The docs' links work, what they take from the code is up to date, and commands and code do what the docs say."""

import importlib
import re
import site
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    ROOT / "deploy" / "README.md",
    ROOT / "ray_fork" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


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


def test_a_file_imports_only_from_its_room_and_from_rooms_that_the_tour_lists_below_it() -> None:
    tour = (ROOT / "docs" / "understand" / "tour.md").read_text(encoding="utf-8").partition("## The rooms")[2]
    floors = {room: floor for floor, room in enumerate(re.findall(r"^    (\w+)/? {2,}", tour, re.MULTILINE))}
    top = {"api", "cli", "keywords", "__init__", "__main__"}  # other files beside the rooms are the base
    assert {path.name for path in (ROOT / "mnist_ray").iterdir() if (path / "__init__.py").exists()} < {*floors}

    def floor_of(module: str) -> int:
        name = module.split(".")[1]
        return floors["jobs"] if name in top else floors.get(name, floors["base"])

    for file in (ROOT / "mnist_ray").rglob("*.py"):
        own = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        imported = re.findall(
            r"^\s*from (mnist_ray(?:\.\w+)*) import (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE
        )
        for module, name in imported:
            used = module if "." in module else f"{module}.{name}"
            assert floor_of(used) >= floor_of(own), f"{own} imports {used}"


@pytest.mark.parametrize("package", ["mnist_ray", "ray_fork", "benchmarks"])
def test_each_source_file_that_a_package_names_by_its_path_exists(package: str) -> None:
    places = [ROOT, ROOT / package, ROOT / "mnist_ray", *map(Path, site.getsitepackages())]
    for file in (ROOT / package).rglob("*.py"):
        for path in re.findall(r"(?<![\w}])[\w./-]*/\w+\.py\b", file.read_text(encoding="utf-8")):
            is_made = (ROOT / "mnist_ray" / "templates" / "project" / f"{path}.jinja").exists()  # in a new project
            assert is_made or any((place / path.lstrip("/")).exists() for place in places), f"{file} names {path}"


def test_the_tours_code_finds_its_image_where_the_tour_says(capsys: pytest.CaptureFixture[str]) -> None:
    tour = (ROOT / "docs" / "understand" / "tour.md").read_text(encoding="utf-8")
    _, code, after = re.split("```(?:python)?\n", tour)
    exec(code, {})
    assert capsys.readouterr().out == re.search(r"^    (step .+\n)", after, re.MULTILINE)[1]  # type: ignore[index]


def test_the_pages_name_the_ray_that_clusters_get_among_those_that_were_tried() -> None:
    (pin,) = re.findall(r"^ray==(.+)$", (ROOT / "deploy" / "constraints.txt").read_text(), re.MULTILINE)
    assert f"| {pin} |" in (ROOT / "docs" / "understand" / "ray.md").read_text(encoding="utf-8")


def test_the_reference_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    reference = importlib.import_module("write_reference")
    for path, page in reference.PAGES.items():
        assert path.read_text(encoding="utf-8") == page(), "run: python docs/write_reference.py"


def test_the_recorded_kill_and_resume_ends_with_the_weights_of_an_undisturbed_run() -> None:
    lines = [
        text.text or "" for text in ElementTree.parse(ROOT / "docs" / "kill.svg").iter() if text.tag.endswith("text")
    ]
    of_killed, of_undisturbed = (line.partition(":")[2] for line in lines[-2:])
    assert "weights_sha256" in of_killed
    assert of_killed == of_undisturbed
    assert [line for line in lines if line.startswith(("$", "Killed"))][1] == "Killed"


def test_a_recording_shows_each_line_once_and_dots_for_a_hidden_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    cast = importlib.import_module("write_cast")
    moments = iter([0.0, 0.5, 0.5, 30.0])
    found = cast.recorded(["run <1>", "confusion 1", "            2", "test"], 1.0, now=lambda: next(moments, 30.0))
    assert [line.text for line in found] == ["run <1>", "…", "test"]
    assert ElementTree.fromstring(cast.drawn(found)) is not None
