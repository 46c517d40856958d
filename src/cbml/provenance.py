"""What a result was computed with: code, packages, device."""

import ast
import hashlib
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
TOOLS = ("mlflow", "dvc")  # they run a cell, and do not change it
# Beside the modules of network and loss themselves.
TRAINING: tuple[str, ...]
TRAINING = ("training/loop.py", "training/device.py", "network.py", "models/trunks.py", "losses/base.py")
TRAINING += ("data/images.py", "data/loading.py", "data/crops.py", "samplers/base.py")
TRAINING += ("samplers/kmeans.py", "models/heads.py", "models/teacher.py")


def revision() -> str:
    """The git commit of this source, with `-dirty` if src/ or pipeline/ differ from it; "unknown" without git, or if
    the repository around it does not know it. Says once what git has to say against it.

    Nothing else counts: DVC writes params.yaml before every experiment, and what is in it is recorded with each cell.
    """
    if not _git("ls-files", "--", "."):  # unpacked inside another repository
        return "unknown"
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
    """A hash of each source file that takes part in training, by its path in this package.

    Args:
        taking_part: network, loss and batches.
    """
    parts = [part for each in taking_part for part in (each.modules() if isinstance(each, nn.Module) else [each])]
    own = {type(part).__module__ for part in parts}
    files = {name.removeprefix("cbml.").replace(".", "/") + ".py" for name in own if name.startswith("cbml.")}
    return {name: code_hash(SOURCE / name) for name in sorted(files | set(TRAINING))}


def changed(code: dict[str, str]) -> list[str]:
    """Those files of `training_code` that are not what they were."""
    return [name for name, value in code.items() if value != code_hash(SOURCE / name)]


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
