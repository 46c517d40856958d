"""Cells on the workers of Ray: killed, lost, failing, interrupted; and taken by DVC afterwards."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from helpers import FEW_CLASSES, environment, ran, tiny_params

from cbml.errors import UserError
from cbml.launch.pending import ask_dvc
from cbml.stages.train import train_cell
from cbml.workspace import Workspace

pytest.importorskip("ray", reason="Ray is not installed (pip install 'cbml[ray]')")
pytestmark = pytest.mark.slow

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # for a cluster of the test's own
CELL = "resnet18-{}-16-0-glyphs"
SETTINGS = "-S 'loss=[cbml_log]' -S recipe.iterations=60 -S recipe.checkpoint_every=1 -S recipe.validate_every=30"


@pytest.fixture(scope="module", autouse=True)
def apart(tmp_path_factory):
    """A token and nobody's cluster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 4)
        # `launch` sets the first by itself; the last, if it were empty, would forbid to say that there are GPUs.
        for name in (*LOOPBACK, "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def lists(repository):
    """The repository with the lists of its one cell."""
    ran(repository, f"dvc exp run {SETTINGS} build_lists")
    return repository


@pytest.fixture
def checkout(lists, monkeypatch):
    """It without a trained cell, which DVC's cache would have, too."""
    lock = yaml.safe_load((lists / "dvc.lock").read_text())
    lock["stages"] = {name: stage for name, stage in lock["stages"].items() if not name.startswith("train@")}
    (lists / "dvc.lock").write_text(yaml.safe_dump(lock))
    for name in ("runs", ".checkpoints", ".dvc/cache/runs", ".cache/logs"):
        path = lists / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    monkeypatch.chdir(lists)
    yield lists
    for process in Launched.begun:  # of a test that failed
        process.kill()
    Launched.begun.clear()


@pytest.fixture(scope="module")
def expected(lists, tmp_path_factory):
    """The hash of the cell's weights when it is trained here, unbroken."""
    other = tmp_path_factory.mktemp("other")
    for name in ("conf", "lists", "data", "params.yaml"):
        (other / name).symlink_to(lists / name)
    workspace = Workspace(other, other)
    (cell,) = workspace.cells("glyphs")
    return json.loads((train_cell(cell, workspace) / "run.json").read_text())["final_weights_sha256"]


class Launched:
    """`pipeline.launch` as a process, what it says in a file."""

    begun = []

    def __init__(self, checkout, *options, **variables):
        self.checkout, self.said = checkout, checkout / "launch.txt"
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.launch", "--cpus-per-cell", "1", *options],
                cwd=checkout,
                env=environment() | variables | {"PYTHONPATH": "src"},
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # also where it is ignored
            )
        self.begun.append(self.process)

    def until(self, happened, seconds=300):
        """Wait, and return what there is then."""
        end = time.monotonic() + seconds
        while not (found := happened()):
            assert self.process.poll() is None and time.monotonic() < end, self.said.read_text()
            time.sleep(0.1)
        return found

    def until_saved(self, loss="cbml_log"):
        self.until(lambda: [*self.checkout.glob(f".checkpoints/*-{loss}-*/*/state.pt")])

    def trainers(self, loss=""):
        found = []
        for each in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                line = each.cmdline()
                if "pipeline.train" in line and loss in " ".join(line):
                    found.append(each)
        return found

    def ended(self, seconds=300):
        """Its exit status and what it has said."""
        return self.process.wait(seconds), self.said.read_text()


def log_of(checkout, loss="cbml_log"):
    (file,) = checkout.glob(f".cache/logs/*-{loss}-*.log")
    return file.read_text()


def record_of(checkout, loss="cbml_log"):
    (file,) = checkout.glob(f".checkpoints/*-{loss}-*/*/run/run.json")
    return json.loads(file.read_text())


def listeners(process):
    """Addresses on which a process and its children listen."""
    for each in [process, *process.children(recursive=True)]:
        try:
            yield from (c.laddr.ip for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN)
        except psutil.Error:
            continue


def test_a_killed_worker_a_failing_cell_and_an_edit_meanwhile_then_dvc_takes_what_was_trained(checkout, expected):
    (checkout / "bad.pth").write_text("no weights")
    more = "-S 'backbone=[resnet18,resnet34]' -S backbone.resnet34.weights=bad.pth"
    assert ran(checkout, f"dvc exp run {SETTINGS} {more} build_lists") == []
    params = (checkout / "params.yaml").read_text()
    launched = Launched(checkout, "--gpus", "2")
    launched.until_saved()
    (checkout / "params.yaml").write_text(params.replace("lr: 0.001", "lr: 0.1"))
    assert {*listeners(psutil.Process(launched.process.pid))} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    (trainer,) = launched.trainers("--backbone resnet18")
    trainer.parent().kill()
    psutil.wait_procs([trainer], 30)
    assert not trainer.is_running()
    status, said = launched.ended()
    assert status == 1 and "begins again, for the 2. time," in said and "1 of 2 cells are trained" in said, said
    (failure,) = re.findall(r"^(resnet34-\S+): failed: .*bad.pth.* \(log: (.*)\)$", said, re.MULTILINE)[-1:]
    assert Path(failure[1]).read_text().count("error: ") == 1  # not tried again
    (log,) = checkout.glob(".cache/logs/resnet18-*.log")
    assert re.search(r"continues after iteration \d+", log.read_text())

    (checkout / "params.yaml").write_text(params)
    name = f"train@{CELL.format('cbml_log')}"
    commands, known = ask_dvc(checkout)
    assert len(commands) == 2 and known == 0
    assert ran(checkout, f"dvc repro {name}") == [name]
    run = checkout / "runs/glyphs/resnet18-cbml_log-16-0/run.json"
    assert json.loads(run.read_text())["final_weights_sha256"] == expected
    assert (
        log.read_text().count("Recall@1") >= 2
        and "up to date"
        in subprocess.run(
            ["dvc", "status", name], cwd=checkout, capture_output=True, text=True, env=environment()
        ).stdout
    )
    # DVC's answer counts the workspace, and what the run cache has.
    assert ask_dvc(checkout) == (commands[-1:], 1) and "resnet34" in commands[-1]
    lock = yaml.safe_load((checkout / "dvc.lock").read_text())
    del lock["stages"][name]
    (checkout / "dvc.lock").write_text(yaml.safe_dump(lock))
    assert ask_dvc(checkout) == (commands[-1:], 1)


def test_ctrl_c_ends_it_at_once_and_a_second_launch_goes_on(checkout, expected):
    ran(checkout, f"dvc exp run {SETTINGS} build_lists")
    launched = Launched(checkout)
    launched.until_saved()
    trainers = launched.trainers()
    os.killpg(launched.process.pid, signal.SIGINT)
    status, said = launched.ended(60)
    assert status == 130 and "interrupted" in said and "Traceback" not in said, said
    psutil.wait_procs(trainers, 30)
    assert trainers and not any(each.is_running() for each in trainers)
    assert Launched(checkout).ended()[0] == 0
    assert "continues after iteration" in log_of(checkout) and record_of(checkout)["final_weights_sha256"] == expected
    status, said = Launched(checkout).ended()
    assert status == 0 and "1 are trained and wait for `dvc repro`" in said and "begins" not in said, said


@pytest.mark.parametrize("shared", [True, False], ids=["shared disk", "disks of their own"])
def test_a_node_that_is_lost_is_made_up_for(checkout, expected, tmp_path, shared):
    ran(checkout, f"dvc exp run {SETTINGS} build_lists")
    command = [sys.executable, Path(__file__).with_name("cluster.py")]
    command += [] if shared else [tmp_path / "one", tmp_path / "two"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    cluster = subprocess.Popen(command, env=environment() | LOOPBACK, start_new_session=True, **pipes)
    try:
        launched = Launched(checkout, RAY_ADDRESS=cluster.stdout.readline().strip(), **LOOPBACK)
        launched.until_saved()
        (place,) = re.findall(r"begins on \S+ (\w{4}), GPU 0", launched.said.read_text())
        print(place, file=cluster.stdin, flush=True)
        status, said = launched.ended()
    finally:
        cluster.stdin.close()  # which ends it
        cluster.wait(60)
    assert status == 0 and "begins again" in said and "raylet" not in said, said  # Ray's own noise
    assert "continues after iteration" in log_of(checkout)
    assert record_of(checkout)["final_weights_sha256"] == expected


def test_a_cell_on_two_gpus_is_one_cell(checkout):
    ran(checkout, f"dvc exp run {SETTINGS} -S recipe.freeze_bn=true build_lists")
    status, said = Launched(checkout, "--gpus", "2", "--gpus-per-cell", "2").ended()
    assert status == 0 and "GPU 0,1" in said, said
    assert record_of(checkout)["numerics"]["processes"] == 2
    assert log_of(checkout).count("iteration 60: Recall@1") == 1


def test_two_processes_share_the_trials_of_a_study(checkout):
    recipe = FEW_CLASSES | {"train": "head", "views": 2, "search": {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}}
    (checkout / "params.yaml").write_text(yaml.safe_dump(tiny_params(recipe=recipe)))
    command = [sys.executable, "-m", "pipeline.tune", "glyphs", "--trials=6", "--folds=2", "--processes=2"]
    ended = subprocess.run(
        command, cwd=checkout, env=environment() | {"PYTHONPATH": "src"}, capture_output=True, text=True
    )
    assert ended.returncode == 0 and "2 of 2 processes are done" in ended.stderr, ended.stderr
    logs = [(checkout / f".cache/logs/tune-{i}.log").read_text() for i in (1, 2)]
    numbers = [re.findall(r"^cbml_log, trial (\d) of 6: [\d.]+ with", log, re.MULTILINE) for log in logs]
    assert sorted(sum(numbers, [])) == [*"123456"]  # one study: each trial was one process's
    assert (checkout / "reports/glyphs/tuning/trials.csv").read_text().count("\n") == 7
    assert (checkout / "conf/paper/tuned_glyphs_tiny_resnet18.yaml").is_file()


def test_lists_that_are_not_of_these_parameters_are_refused(checkout):
    ran(checkout, f"dvc exp run {SETTINGS} build_lists")
    params = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(params.replace("images_per_class: 6", "images_per_class: 5"))
    try:
        with pytest.raises(UserError, match="first: dvc repro (download|build_lists)@glyphs"):
            ask_dvc(checkout)
    finally:
        (checkout / "params.yaml").write_text(params)
