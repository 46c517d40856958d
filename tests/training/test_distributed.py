"""One cell on two processes, or in pieces: the same gradient as of the whole batch in one."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from gradients import KINDS, difference, gradients
from helpers import ROOT, TINY_RECIPE, checkpoints, environment, record, run, tiny_params, train_command

from cbml.errors import UserError
from cbml.stages import train as stage

ROUNDING = 1e-5  # of float32, after a network's sums in another order


def torchrun(*command, processes=2, **options):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*run, *options.pop("more", []), *command]


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    """By kind, the gradient of the whole batch in one process."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("data", "lists"):
            (folder / name).symlink_to(tiny_dataset / name)
        here = stage.Workspace.here()
        return {kind: gradients(here, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_gradient_of_the_whole_batch(workspace, whole, kind):
    ours, loss = gradients(workspace, kind, micro_batch=5)  # 5, 5 and 2
    assert loss == pytest.approx(whole[kind][1], rel=ROUNDING)
    assert max(difference(ours, whole[kind][0])) < ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_two_processes_give_the_gradient_of_one(tiny_dataset, tmp_path, whole, micro_batch):
    for name in ("data", "lists"):
        (tmp_path / name).symlink_to(tiny_dataset / name)
    script = ROOT / "tests" / "training" / "gradients.py"
    command = torchrun(str(script), str(tmp_path), str(micro_batch))
    path = os.pathsep.join([environment()["PYTHONPATH"], str(ROOT / "tests")])
    done = subprocess.run(command, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"gradients-{rank}.pt") for rank in (0, 1))
    for kind in KINDS:
        assert torch.equal(first[kind][0], second[kind][0]), kind
        print(kind, micro_batch, *difference(first[kind][0], whole[kind][0]))
        assert max(difference(first[kind][0], whole[kind][0])) < ROUNDING, kind
        assert first[kind][1] == pytest.approx(whole[kind][1], rel=ROUNDING)


@pytest.mark.slow
def test_two_processes_train_a_cell_and_one_that_is_killed_is_made_up_for(project, workspace):
    recipe = TINY_RECIPE | {"freeze_bn": True, "iterations": 40, "checkpoint_every": 1, "validate_every": 20}
    recipe |= {"color_jitter": [0.2, 0.2, 0.2, 0.1], "lr": 1e-5}
    whole = run(workspace, recipe=recipe)
    before, losses = record(whole), stage.read_csv(whole / "losses.csv", "train").loss
    for name in ("runs", ".checkpoints"):
        shutil.rmtree(name)
    process = subprocess.Popen(
        torchrun(*train_command()[1:], more=["--max-restarts=3"]),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not any(file.name == "state.pt" for file in checkpoints()):
        time.sleep(0.1)
    ranks = [each for each in psutil.Process(process.pid).children() if "pipeline.train" in each.cmdline()]
    ranks[-1].send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0 and "continues after iteration" in said, said
    after = record(whole)
    assert (before["numerics"]["processes"], after["numerics"]["processes"]) == (1, 2)
    assert after["key"] == before["key"]
    assert stage.read_csv(whole / "losses.csv", "train").loss.tolist() == pytest.approx(losses.tolist(), rel=1e-2)
    assert said.count("iteration 40: Recall@1") == 1  # one process speaks


@pytest.mark.slow
def test_processes_that_are_started_again_meet_the_living():
    script = ROOT / "tests" / "training" / "restarted.py"
    command = torchrun(str(script), more=["--max-restarts=2"])
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


REFUSED = {
    "batch normalisation": ({"freeze_bn": False, "micro_batch": 4}, "normalises whole batches; allowed with it: rec"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_pieces_cannot_compute_is_refused(workspace, what):
    changes, told = REFUSED[what]
    with pytest.raises(UserError, match=told):
        run(workspace, recipe=TINY_RECIPE | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"freeze_bn": False}, "error: batch normalisation is trained, which several processes share on GPUs alone"),
        ({"freeze_bn": True, "batch_size": 9, "instances": 3}, "error: recipe.batch_size 9: 2 processes need a mult"),
    ],
)
def test_what_two_processes_cannot_share_is_refused_in_one_line(project, changes, told):
    (project / "params.yaml").write_text(yaml.safe_dump(tiny_params(recipe=TINY_RECIPE | changes)))
    done = subprocess.run(torchrun(*train_command()[1:]), env=environment(), capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and lines and all(line.startswith(told) for line in lines)


def test_a_cell_without_pieces_keeps_its_key_and_one_in_pieces_is_another(workspace):
    keys = []
    for micro_batch in (None, 4):
        recipe = TINY_RECIPE | {"freeze_bn": True, "iterations": 0, "micro_batch": micro_batch}
        keys.append(record(run(workspace, recipe=recipe))["key"])
        assert ("micro_batch" in params_of_run(workspace)) == (micro_batch is not None)
    assert keys[0] != keys[1]


def params_of_run(workspace):
    (cell,) = workspace.cells("glyphs")
    return yaml.safe_load((workspace.run(cell) / "cell.yaml").read_text())["recipe"]
