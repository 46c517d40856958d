"""What a result was computed with: code, packages, device."""

import ast
import hashlib
import importlib.util
import io
import os
import platform
import re
import subprocess
import tokenize
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cbml.progress import message

SOURCE = Path(__file__).resolve().parent
PACKAGES = ("torch", "torchvision", "lightning-fabric", "pytorch-metric-learning", "timm", "numpy", "pillow")
REVISION = "CBML_REVISION"  # environment variable: that of a source which git does not know
TOOLS = ("mlflow", "dvc")  # they run a cell, and do not change it
# What stages import and no result comes from; what these import is not looked at either. A package is all within it.
NEUTRAL = (
    "cbml.errors",  # says what is wrong
    "cbml.progress",  # says how far it is
    "cbml.files",  # writes bytes whole or not at all, whichever they are
    "cbml.fetch",  # brings files, whose content is told by its hash
    "cbml.workspace",  # where things lie
    "cbml.provenance",  # what is recorded beside a result
    "cbml.tracking",  # records a result elsewhere
    "cbml.stages.hand_over",  # likewise
    "cbml.stages.check",  # refuses what cannot be computed
    "cbml.schema",  # how parameters are read: those of a cell are recorded with its result, and are part of its key
    "cbml.spec",  # likewise
    "cbml.samplers.config",  # names every sampler; the one that takes part is told by its object
)


def revision() -> str:
    """The git commit of this source, with `-dirty` if src/ or pipeline/ differ from it. Without git, or if the
    repository around it does not know it: what CBML_REVISION says, or "unknown". Says once what git has against it.

    Nothing else counts: DVC writes params.yaml before every experiment, and what is in it is recorded with each cell.
    """
    if not _git("ls-files", "--", "."):  # unpacked inside another repository, or a copy for another machine
        return os.environ.get(REVISION, "unknown")
    commit = _git("describe", "--always", "--abbrev=12")
    # With files that git does not know: a loss of one's own is one at first.
    own = [os.path.relpath(folder, SOURCE) for folder in (SOURCE.parent, SOURCE.parents[1] / "pipeline")]
    dirty = commit and _git("status", "--porcelain", "--untracked-files=normal", "--", *own)
    return f"{commit}-dirty" if dirty else commit or "unknown"


def _git(*words: str) -> str:
    # Not of a repository that the environment names, as it does in a hook or in `git rebase --exec`.
    named = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")
    environment = {name: value for name, value in os.environ.items() if name not in named} | {"LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *words], cwd=SOURCE, env=environment, capture_output=True, text=True, encoding="utf-8"
        )
    except OSError:  # no git
        return ""
    if done.returncode and "not a git repository" not in done.stderr:
        _say_once(f"the git commit of this source is not recorded: {' '.join(done.stderr.split())}")
    return done.stdout.strip() if not done.returncode else ""


@cache
def _say_once(text: str) -> None:
    message(text)


def packages(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def packages_of(record: dict[str, Any]) -> dict[str, str]:
    """What `packages` found when a run was recorded, by its run.json."""
    return {name: version for name, version in record["versions"].items() if name in PACKAGES}


def versions() -> dict[str, str]:
    """Interpreter, platform, this source and the packages that matter."""
    facts = {"python": platform.python_version(), "platform": platform.platform(), "cbml": revision()}
    return facts | packages(PACKAGES + TOOLS)


def device_name() -> str:
    """What computes here: the name of the GPU, or of the CPU with its number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    models = (
        re.findall(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8"), re.MULTILINE) if info.is_file() else []
    )
    return f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} thread(s)"


def training_code(*taking_part: Any) -> dict[str, str]:
    """A hash of each source file that a trained network comes from, by its path in this package.

    Args:
        taking_part: network, loss and sampler, whose own modules no import names.
    """
    return _hashes("cbml.stages.train", taking_part)


def scoring_code(*taking_part: Any) -> dict[str, str]:
    """The same of what a cell's metrics come from; `taking_part` is its network."""
    return _hashes("cbml.stages.evaluate", taking_part)


def _hashes(stage: str, taking_part: tuple[Any, ...]) -> dict[str, str]:
    parts = [part for each in taking_part for part in (each.modules() if isinstance(each, nn.Module) else [each])]
    own = {name for part in parts if (name := type(part).__module__).startswith("cbml.")}
    files = sorted(_file(module) for module in closure(stage, *own))
    return {file: code_hash(SOURCE / file) for file in files}


def closure(*modules: str, neutral: tuple[str, ...] = NEUTRAL) -> set[str]:
    """These modules of this package and all that they import of it, one through another, but for those of `neutral`.

    From a package's `__init__`, which names what is in it and computes nothing, a name leads to the module that it is
    imported from, and to no other; one that is made there (the union of all options, say) leads nowhere: which of them
    takes part is for the objects to tell.
    """
    found: set[str] = set()
    open_ends = list(modules)
    while open_ends:
        module = open_ends.pop()
        if module not in found and not any(f"{module}.".startswith(f"{name}.") for name in neutral):
            found.add(module)
            open_ends += [target for base, name, _ in _imports(module) if (target := _definer(base, name))]
    return found


def _imports(module: str) -> list[tuple[str, str, str]]:
    """What a module imports of this package: from where, which name ("" for a module itself), and what it calls it."""
    package = module if _file(module).endswith("__init__.py") else module.rpartition(".")[0]
    found = []
    for node in ast.walk(_parsed((SOURCE / _file(module)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "", "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            found += [(base, alias.name, alias.asname or alias.name) for alias in node.names]
    return [each for each in found if f"{each[0]}.".startswith("cbml.")]


def _definer(base: str, name: str) -> str | None:
    """The module that `from base import name` leads to; see `closure`."""
    if name in ("", "*"):
        return base
    if _file(f"{base}.{name}"):
        return f"{base}.{name}"
    if not _file(base).endswith("__init__.py"):
        return base
    behind = [(origin, original) for origin, original, called in _imports(base) if called == name]
    return _definer(*behind[0]) if behind else None


def _file(module: str) -> str:
    """The source file of a module, by its path in this package; "" if there is none."""
    path = "/".join(module.split(".")[1:])
    names = (f"{path}.py", f"{path}/__init__.py".lstrip("/"))
    return next((name for name in names if (SOURCE / name).is_file()), "")


_parsed = cache(ast.parse)


def changed(code: dict[str, str]) -> list[str]:
    """Those files of `training_code` or `scoring_code` that are not what they were, or no longer there."""
    return [name for name, value in code.items() if value != code_hash(SOURCE / name)]


def gone(names: list[str]) -> list[str]:
    """Those of `changed` that are no longer there."""
    return [name for name in names if code_hash(SOURCE / name) == "absent"]


def code_hash(file: Path) -> str:
    """12 hex digits that change with a file's code, and not with its comments, docstrings and blank lines."""
    try:
        if not file.resolve().is_relative_to(SOURCE):  # a name from somebody's run.json
            return "absent"
        return _code_hash(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):  # no such file, no name of one, no Python
        return "absent"


@cache  # a table asks for each of its cells
def _code_hash(text: str) -> str:
    lines = text.split("\n")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            rows = slice(node.lineno - 1, node.end_lineno)
            beside = lines[rows][0].encode()[: node.col_offset] + lines[rows][-1].encode()[node.end_col_offset :]
            if not beside.strip():
                lines[rows] = [""] * len(lines[rows])
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    kept = [line.rstrip() for line in lines if line.strip()]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:12]
