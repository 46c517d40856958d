"""What `pipeline.launch` does without Ray, and that nothing else needs it."""

import io
import re
import subprocess
import sys
import tarfile

import pytest
from helpers import ROOT, ended, environment

from cbml import progress, provenance
from cbml.errors import UserError
from cbml.launch import node
from cbml.launch.driver import Options, commands
from cbml.launch.pending import Pending
from cbml.launch.show import Display

HIDDEN = """
import importlib, pkgutil, sys
sys.modules["ray"] = None
import cbml, pipeline
for package in (cbml, pipeline):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
import cbml.launch.driver as driver
driver.summary = lambda workspace: [driver.Pending("key", [], ".", 1, 1, False)]
try:
    driver.launch(None, driver.Options())
except driver.UserError as error:
    print(error)
"""


def test_nothing_imports_ray_and_a_launch_says_how_to_install_it():
    done = subprocess.run([sys.executable, "-c", HIDDEN], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("Ray is not installed; pip install 'cbml[ray]'")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--cells-per-gpu", "0"], "error: --cells-per-gpu 0; allowed: from 1"),
        (["--cpus-per-cell", "0"], "error: --cpus-per-cell 0; allowed: from 1"),
        (["--gpus", "-1"], "error: --gpus -1; allowed: from 0"),
        (["--cells-per-gpu", "2", "--gpus-per-cell", "2"], "error: --cells-per-gpu and --gpus-per-cell: "),
    ],
)
def test_options_that_do_not_fit_are_one_line(arguments, told):
    assert ended("pipeline.launch", *arguments).startswith(told)


def test_a_number_of_tuning_processes_is_from_one():
    assert ended("pipeline.tune", "glyphs", "--processes", "0") == "error: --processes 0; allowed: from 1"


def test_gpus_are_not_offered_for_a_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(UserError, match="leave out RAY_ADDRESS"):
        Options(gpus=2).check()


def cell(key="a", finished=False):
    return Pending(key, ["--dataset", "glyphs", "--seed", "0"], "runs/glyphs/a", 8, 60, finished)


def test_commands_are_those_of_dvc_for_what_is_not_trained():
    (line,) = commands([cell(), cell("b", finished=True)], Options())
    assert line == "PYTHONPATH=src python -m pipeline.train --dataset glyphs --seed 0"
    (line,) = commands([cell()], Options(gpus_per_cell=4))
    assert " --nproc-per-node=4 -m pipeline.train --dataset glyphs" in line


def test_a_checkpoint_travels_whole_and_replaces_what_is_there(tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for name in ("a/state.pt", "a/best-1.pt", "a/run/final.pt", "a/.state.pt.host.1.partial/state.pt"):
        (theirs / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs / name).write_text(name)
    (ours / "b").mkdir(parents=True)
    node.unpack(node.pack(theirs), ours)
    files = {str(file.relative_to(ours)) for file in ours.rglob("*") if file.is_file()}
    assert files == {"a/state.pt", "a/best-1.pt", "a/run/final.pt"}
    with tarfile.open(fileobj=io.BytesIO(node.pack(theirs, finished=True))) as tar:
        assert tar.getnames() == ["a/run/final.pt"]


def test_what_a_training_says_becomes_a_line(tmp_path, capsys, monkeypatch):
    keeper = node.Keeper(str(tmp_path), {"a": str(tmp_path / "a.log")}, {"a": 8})
    keeper.begin("a", "1234", "vm 1234", "0")
    display = Display([cell(), cell("b")])
    display.update(keeper.states(), ["a", "b"])
    assert capsys.readouterr().err == "a: begins on vm 1234, GPU 0\n"
    keeper.heard("a", "a: iteration 30: Recall@1 41.7 %\n")
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    steps = progress.progress(range(60), "a", "images", initial=39, scale=8)
    next(steps), next(steps)
    keeper.heard("a", capsys.readouterr().err)
    keeper.heard("a", "embed:  53%|██   | 1.08k/2.04k [00:11<00:10, 95.4 images/s]\n")
    display._shown -= 100  # a minute later
    display.update(keeper.states(), ["a", "b"])
    first, bar = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"a: iteration 40 of 60, [\d.]+[kM]? images/s, Recall@1 41.7 %, vm 1234, GPU 0", first)
    assert re.search("0 of 2 done, 0 failed, 1 waiting", bar)
    keeper.begin("a", "5678", "vm 5678", "1")
    display.update(keeper.states(), ["a", "b"])
    assert "a: begins again, for the 2. time, on vm 5678, GPU 1" in capsys.readouterr().err
    assert (tmp_path / "a.log").read_text().count("\n") == 3


def test_on_a_terminal_lines_are_written_anew_and_events_stay(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    display, states = Display([cell(), cell("b")]), {"a": {"place": "vm 1234", "attempts": 1, "iteration": 3}}
    display.update(states, ["a", "b"])
    assert capsys.readouterr().err.splitlines()[1].startswith("a: iteration 3 of 60, vm 1234")
    display.done = 1
    display.event("a: trained (1 of 2)")
    assert capsys.readouterr().err == "\x1b[2A\x1b[Ja: trained (1 of 2)\n"
    display.update(states, ["b"])
    assert re.match("█{15}░{15} 1 of 2 done, 0 failed, 1 waiting", capsys.readouterr().err)


def test_the_revision_travels_with_a_copy_of_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "SOURCE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv(provenance.REVISION, "0123456789ab")
    assert provenance.revision() == "0123456789ab"
