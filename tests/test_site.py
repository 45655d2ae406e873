"""The home page of the docs, whose links also order the site's navigation, leads to every page."""

import re

from tests.conftest import ROOT


def test_the_home_page_links_every_page_of_the_docs() -> None:
    docs = ROOT / "docs"
    linked = re.findall(r"\]\(([^)#]+)", (docs / "README.md").read_text(encoding="utf-8"))
    pages = {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")}
    assert pages - {"README.md"} <= {*linked}
