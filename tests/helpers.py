"""What tests of several rooms share."""

import copy
import functools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

from cbml.evaluation.retrieval import retrieve
from cbml.models import BackboneConfig
from cbml.report.common.queries import judge
from cbml.spec.options import option_file
from cbml.stages.train import train_cell
from cbml.training import loop

ROOT = Path(__file__).parents[1]


TINY_GLYPHS = {"type": "glyphs", "classes": 12, "images_per_class": 6, "size": 24, "seed": 0}


TINY_GLYPHS |= {"ks": [1, 2, 4, 8], "watch": "src/cbml/data/sources/glyphs.py"}


TINY_RECIPE = {
    "name": "tiny",
    "iterations": 6,
    "batch_size": 8,
    "instances": 2,
    "lr": 1e-3,
    "weight_decay": 5e-4,
    "freeze_bn": False,
    "resize": 24,
    "crop": 20,
    "flip": True,
    "validate_every": 2,
    "checkpoint_every": 4,
}
FEW_CLASSES = TINY_RECIPE | {"instances": 4}  # two a batch


# What would lead a stage elsewhere, or have it do otherwise.
FOREIGN = ("DVC_ROOT", "MLFLOW_TRACKING_URI", "CBML_RESUME")


def environment():
    """For a stage as a process of its own: this source, one thread, and nobody's tracking store."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return kept | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1", "PATH": path}


def ended(module, *arguments):
    """What a script ends with, run as `python -m` does in this process, which has all packages already: one line."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.syspath_prepend(ROOT)
        patch.setattr(sys, "argv", [module, *arguments])
        runpy.run_module(module, run_name="__main__")
    return end.value.code  # Python prints a text, and ends with 1


def forked(work):
    """Start a process that has all packages already and does `work`; its id."""
    if child := os.fork():
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ending(child):
    """The exit code of such a process, when it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def entry(group, name):
    """What an option's file in conf/ comes to."""
    return copy.deepcopy(_entry(ROOT / "conf", group, name))


_entry = functools.cache(option_file)


def tiny_params(**changes):
    """The content of a params.yaml with one cell, glyphs × resnet18 × cbml_log × 16 × 0; `changes` replace groups."""

    return {
        "dataset": {"glyphs": TINY_GLYPHS},
        "backbone": {"resnet18": entry("backbone", "resnet18")},
        "loss": {"cbml_log": entry("loss", "cbml_log")},
        "recipe": dict(TINY_RECIPE),
        "embedding_dim": [16],
        "seed": [0],
    } | changes


# Two of the six training classes for validation.
VALIDATING = TINY_RECIPE | {
    "select_by": {"metric": "map_at_r", "validation_classes": 1 / 3},
    "checkpoint_every": 1,
}


def run(workspace, **changes):
    """Train the one cell of the tiny parameters with some groups replaced; its run folder."""
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params(**changes)))
    (cell,) = workspace.cells("glyphs")
    return train_cell(cell, workspace)


def record(folder):
    return json.loads((folder / "run.json").read_text())


def checkpoints():
    """The finished files of all checkpoints, without locks."""
    files = [file for file in Path(".checkpoints").rglob("*") if file.is_file() and file.suffix != ".lock"]
    return [file for file in files if ".partial" not in str(file)]


def from_the_beginning(workspace, **changes):
    """The result of an unbroken run."""
    shutil.rmtree(".checkpoints", ignore_errors=True)
    outcome = result(run(workspace, **changes))
    shutil.rmtree(".checkpoints")
    return outcome


def result(folder):
    """All of a run that must not depend on how often it was interrupted."""
    return (
        record(folder)["final_weights_sha256"],
        (folder / "losses.csv").read_text(),
        (folder / "validations.csv").read_text(),
    )


def break_at(monkeypatch, *numbers):
    """Interrupt the evaluations of these numbers, counted from 1; returns a list that grows with each evaluation."""
    evaluate, calls = loop.evaluate, []

    def evaluate_or_break(*args, **kwargs):
        calls.append(None)
        if len(calls) in numbers:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", evaluate_or_break)
    return calls


def broken(workspace, **changes):
    with pytest.raises(KeyboardInterrupt):
        run(workspace, **changes)


def train_command(*options):
    """The command of the stage `train` for the tiny cell, with some of its options replaced."""
    axes = "--dataset glyphs --backbone resnet18 --loss cbml_log --embedding-dim 16 --seed 0"
    return [sys.executable, "-m", "pipeline.train", *axes.split(), *options]


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mlflow", "dvc", "git"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def angles(*degrees):
    """Unit vectors in the plane: a difference of angles is easy to think about."""
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def clusters(classes, per_class, *, dim=8, noise=1.0, seed=0):
    """Embeddings scattered about a random centre a class, and labels that neither start at 0 nor are in order."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.randperm(classes, generator=generator) * 3 + 7).repeat(per_class)
    centres = torch.randn(100, dim, generator=generator)
    return centres[labels] + noise * torch.randn(len(labels), dim, generator=generator), labels


def judged(embeddings, labels, k=8):
    """What `judge` says of what `retrieve` finds."""
    return judge(*(each.numpy() for each in retrieve(embeddings, labels, k)), labels.numpy())


def ran(repository, command):
    """Run a command; the stages that it ran."""
    done = subprocess.run(
        command, cwd=repository, shell=True, env=environment() | {"PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"Running stage '(.*)'", done.stdout)


def stages(loss, *names, dataset="glyphs"):
    return [f"{name}@resnet18-{loss}-16-0-{dataset}" for name in names]


CELL = ("train", "evaluate", "draw")


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def config_of(name, **changes):
    if ENTRIES[name]["type"] == "timm":
        pytest.importorskip("timm", reason="timm is not installed (pip install 'cbml[timm]')")
    return BackboneConfig.model_validate({**ENTRIES[name], **changes})


ENTRIES = {
    name: entry
    for file in sorted((ROOT / "conf/backbone").glob("*.yaml"))
    for name, entry in yaml.safe_load(file.read_text()).items()
}
