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

import jinja2

from mnist_ray.config import ProjectConfig
from mnist_ray.errors import UsageError
from mnist_ray.output import say
from mnist_ray.settings import path_of
from mnist_ray.text import VERSION
from mnist_ray.tools.samples import WRITERS

_PACKAGE = Path(__file__).parent.parent
_TEMPLATES = _PACKAGE / "templates"  # a workload of each kind; project/ has the files that every project has
_SETTINGS = {
    "images": {"num_epochs": 15, "batch_size": 16, "learning_rate": 3e-3},
    "table": {"num_epochs": 20, "batch_size": 32, "learning_rate": 1e-2},
    "text": {"num_epochs": 8, "batch_size": 16, "learning_rate": 3e-3},
    "blank": {"num_epochs": 20, "batch_size": 32, "learning_rate": 3e-2},
}


def new(config: ProjectConfig) -> None:
    """Make a project in a folder, named after it. Raises UsageError, and then leaves nothing behind."""
    project = path_of(config.name, "the project's folder")
    contents = _contents(project.name, config.kind)
    try:
        if os.path.lexists(project) and not (project.is_dir() and not any(project.iterdir())):
            raise UsageError(f"{config.name} exists already; choose another name, or empty it")
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
        raise UsageError(f"cannot make {config.name}: {error.strerror}") from error
    say(f"project    {project}/, whose workload is {project}/workload.py")
    say(f"next       cd {project} && make train, which first makes an environment of its own; or see README.md")


def _contents(name: str, kind: str) -> dict[str, str]:
    """Return the texts of a project's files, except for its data, by their paths."""
    files = {"workload.py": _TEMPLATES / f"{kind}.py.jinja"}
    for template in (_TEMPLATES / "project").rglob("*.jinja"):
        files[str(template.relative_to(_TEMPLATES / "project")).removesuffix(".jinja")] = template
    texts = {file: template.read_text(encoding="utf-8") for file, template in files.items()}
    class_name = _class_name(name, texts["workload.py"])
    requirement = json.dumps(f"mnist_ray[cluster]{requirement_here()}", ensure_ascii=False)
    content = {"name": name, "class_name": class_name, "kind": kind, "requirement": requirement, **_SETTINGS[kind]}
    jinja = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return {file: jinja.from_string(text).render(**content) for file, text in texts.items()}


def _class_name(name: str, workload: str) -> str:
    """Return a project's name in CamelCase. Raises UsageError if the name cannot be used with this workload."""
    if not re.fullmatch(r"[A-Za-z]([_-]?[A-Za-z0-9])*", name):
        raise UsageError(f"{name} is no project name; use ASCII letters, digits, _ and -, and begin with a letter")
    module = name.replace("-", "_")
    class_name = "".join(word[0].upper() + word[1:] for word in module.split("_"))
    found = importlib.util.find_spec(module)  # a folder without __init__.py has no origin
    if module in ("workload", "tests") or (found is not None and found.origin is not None):
        raise UsageError(f"{name} is the name of a Python module; choose another name")
    if keyword.iskeyword(class_name) or re.search(rf"\b{class_name}\b", workload):
        raise UsageError(f"the workload cannot be called {class_name}, which means something else; choose another name")
    return class_name


def requirement_here() -> str:
    """Return where this package came from, as the end of a requirement: `` @ URL``, or ``==VERSION`` from an index."""
    if (_PACKAGE.parent / "pyproject.toml").exists():  # a checkout
        return f" @ {_PACKAGE.parent.as_uri()}"
    try:
        recorded = distribution("mnist_ray").read_text("direct_url.json")  # as PEP 610 defines it
    except PackageNotFoundError:  # the package's folder was copied
        recorded = None
    if recorded is None:
        return f"=={VERSION}"
    found = json.loads(recorded)
    is_of_git = "vcs_info" in found
    return f" @ git+{found['url']}@{found['vcs_info']['commit_id']}" if is_of_git else f" @ {found['url']}"
