"""Makes a project that uses this package: ``mnist-ray new`` after flag parsing."""

from __future__ import annotations

import importlib.util
import json
import keyword
import os
import re
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jinja2

from mnist_ray.config import ProjectConfig
from mnist_ray.errors import UsageError
from mnist_ray.output import say
from mnist_ray.settings import path_of
from mnist_ray.text import PROGRAM, VERSION
from mnist_ray.tools.samples import WRITERS

_PACKAGE = Path(__file__).parent.parent
_FILES = {
    "settings.toml": "settings.toml",
    "pyproject.toml": "pyproject.toml",
    "Makefile": "Makefile",
    "README.md": "README.md",
    ".gitignore": "gitignore",
    "tests/test_workload.py": "test_workload.py",
    "deploy/Dockerfile": "Dockerfile",
    "deploy/rayjob.yaml": "rayjob.yaml",
    ".github/workflows/test.yml": "test.yml",
}  # a project's files, and their templates
_SETTINGS = {
    "images": {"num_epochs": 15, "batch_size": 16, "learning_rate": 3e-3},
    "table": {"num_epochs": 20, "batch_size": 32, "learning_rate": 1e-2},
    "text": {"num_epochs": 8, "batch_size": 16, "learning_rate": 3e-3},
    "blank": {"num_epochs": 20, "batch_size": 32, "learning_rate": 3e-2},
}


def new(config: ProjectConfig) -> None:
    """Make a project in a folder, named after it. Raises UsageError, and then leaves nothing behind."""
    place = config.name
    project = path_of(place, "the project's folder")
    contents = _contents(project.name, config)
    try:
        if os.path.lexists(project) and not (project.is_dir() and not any(project.iterdir())):
            raise UsageError(f"{place} exists already; choose another name, or empty it")
        with tempfile.TemporaryDirectory(dir=project.parent, prefix=f".{project.name}-") as parent:
            made = Path(parent, project.name)
            for file, text in contents.items():
                (made / file).parent.mkdir(parents=True, exist_ok=True)
                (made / file).write_text(text, encoding="utf-8")
            if config.kind in WRITERS:
                (made / "data").mkdir()
                WRITERS[config.kind](made / "data")
            made.rename(project)
    except OSError as error:
        raise UsageError(f"cannot make {place}: {error.strerror}") from error
    say(f"project    {project}/, a workload of kind {config.kind}: {project}/workload.py")
    say(f"next       cd {project}, then make train, which first makes an environment of its own; or see README.md")


def _contents(name: str, config: ProjectConfig) -> dict[str, str]:
    """Return the texts of a project's files, except for its data, by their paths."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PACKAGE / "templates"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    class_name = _class_name(name, (_PACKAGE / "templates" / f"{config.kind}.py.jinja").read_text(encoding="utf-8"))
    requirement = json.dumps(f"mnist_ray[cluster]{requirement_of(config.package)}", ensure_ascii=False)
    content = {"name": name, "class_name": class_name, "kind": config.kind, "requirement": requirement}
    files = {**_FILES, "workload.py": f"{config.kind}.py"}
    return {
        file: templates.get_template(f"{template}.jinja").render(**content, **_SETTINGS[config.kind])
        for file, template in files.items()
    }


def _class_name(name: str, workload: str) -> str:
    """Return a project's name in CamelCase. Raises UsageError if the name cannot be used with this workload."""
    if not re.fullmatch(r"[A-Za-z]([_-]?[A-Za-z0-9])*", name):
        raise UsageError(
            f"{name} is not a valid project name; use ASCII letters, digits, _ and -, and begin with a letter"
        )
    module = name.replace("-", "_")
    class_name = "".join(word[0].upper() + word[1:] for word in module.split("_"))
    if module in ("workload", "tests") or _is_known(module) or _is_installed(name):
        raise UsageError(f"{name} is the name of a Python module or package; choose another name")
    if keyword.iskeyword(class_name) or re.search(rf"\b{class_name}\b", workload):
        raise UsageError(
            f"{name} cannot be the workload's name: {class_name} means something else; choose another name"
        )
    return class_name


def _is_known(module: str) -> bool:
    """Return whether Python finds a module. A folder without ``__init__.py`` is none: its spec has no origin."""
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None


def _is_installed(name: str) -> bool:
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def requirement_of(place: str | None) -> str:
    """Return the end of a requirement of this package: `` @ URL``, or ``==VERSION`` if it came from an index.

    ``place``: the path of a checkout or a wheel, or a URL; None: where this package came from. Raises UsageError.
    """
    if place is None:
        place = _origin()
    if place is None:
        return f"=={VERSION}"
    if "://" in place and not place.startswith("file:"):
        return f" @ {place}" if place.startswith("git+") or place.endswith(".whl") else f" @ git+{place}"
    path = Path(unquote(urlsplit(place).path) if place.startswith("file:") else place).expanduser().absolute()
    if not (path.suffix == ".whl" and path.is_file()) and not (path / "pyproject.toml").is_file():
        raise UsageError(f"{path} is no checkout and no wheel of {PROGRAM}; name one, or a git URL, with --package")
    return f" @ {path.as_uri()}"


def _origin() -> str | None:
    """Return path or URL of the checkout, the wheel or the commit that this package came from; None: an index."""
    if (_PACKAGE.parent / "pyproject.toml").exists():
        return str(_PACKAGE.parent)
    try:
        recorded = distribution("mnist_ray").read_text("direct_url.json")  # as PEP 610 defines it
    except PackageNotFoundError:  # the package's folder was copied
        return None
    if recorded is None:
        return None
    found = json.loads(recorded)
    version_control = found.get("vcs_info")
    return f"git+{found['url']}@{version_control['commit_id']}" if version_control else found["url"]
