"""The site's navigation, its pages from outside of docs/, and its links to files that are not on it."""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent
PARTS = {
    "Learn": ("project/README.md", "learn/"),
    "Do": ("guides/", "project/deploy/"),
    "Understand": ("understand/", "project/ray_fork/", "project/benchmarks/"),
    "Look up": ("reference/", "project/CHANGELOG.md"),
}
OUTSIDE = (
    "README.md",
    "CHANGELOG.md",
    "benchmarks/README.md",
    "benchmarks/measured.md",
    "deploy/README.md",
    "ray_fork/README.md",
)


def on_files(files: Any, config: Any) -> None:
    """Add the pages from outside, as project/…; order each part like the links on the home page."""
    for path in OUTSIDE:
        files.append(File.generated(config, f"project/{path}", abs_src_path=str(ROOT / path)))
    links = re.findall(r"\]\((?:\.\./)?([^)#]+)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    places = {uri: place for place, link in enumerate(links) for uri in (link, f"project/{link}")}
    pages = sorted((file.src_uri for file in files.documentation_pages()), key=lambda uri: (places.get(uri, 999), uri))
    parts = {part: [uri for start in of for uri in pages if uri.startswith(start)] for part, of in PARTS.items()}
    config.nav = [{"Home": "README.md"}, *({part: uris} for part, uris in parts.items())]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let links between pages work on the site; links to other files lead to ``repo_url``, or are plain text."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri.removeprefix("project/") if uri.startswith("project/") else f"docs/{uri}")

    def on_site(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(here, target))
        there = path.removeprefix("docs/") if path.startswith("docs/") else f"project/{path}"
        if files.get_file_from_path(there):
            return f"[{text}]({posixpath.relpath(there, posixpath.dirname(uri) or '.')}{anchor})"
        if path.startswith("docs/") or not (ROOT / path).exists():
            return link[0]  # for mkdocs, which checks it
        return f"[{text}]({config.repo_url}/blob/HEAD/{path})" if config.repo_url else text

    return re.sub(r"\[([^\]]*)\]\(([^)#:\s]+)((?:#[^)\s]*)?)\)", on_site, markdown)
