"""Checkpoints: what is damaged or of other code is not continued, and two processes do not meet."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import (
    TINY_RECIPE,
    break_at,
    broken,
    checkpoints,
    environment,
    from_the_beginning,
    result,
    run,
    train_command,
)

from cbml import provenance
from cbml.stages import evaluate
from cbml.stages.evaluate import evaluate_cell
from cbml.training import checkpoint, loop
from cbml.training.checkpoint import Checkpoint, acquire

OFTEN = {"recipe": TINY_RECIPE | {"checkpoint_every": 1}}


@pytest.fixture
def interrupted(workspace, monkeypatch):
    """A run that was broken off after iteration 3; returns what it would have ended with."""
    unbroken = from_the_beginning(workspace, **OFTEN)
    with monkeypatch.context() as patch:
        break_at(patch, 3)
        broken(workspace, **OFTEN)
    return unbroken


def state():
    (file,) = (file for file in checkpoints() if file.name == "state.pt")
    return file


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "changed bytes"])
def test_a_damaged_checkpoint_is_said_and_the_run_starts_again(workspace, interrupted, capsys, damage):
    content = bytearray(state().read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = b""
    elif damage == "garbage":
        content = b"\x80\x04garbage" * 1000
    else:
        for i in range(30):
            content[len(content) // 2 + 1000 * i] ^= 0xFF
    state().write_bytes(content)
    capsys.readouterr()
    assert result(run(workspace, **OFTEN)) == interrupted
    shown = capsys.readouterr().err
    assert "starts again" in shown and "state.pt: damaged" in shown


def test_other_code_starts_again_and_says_so_unless_told_to_go_on(workspace, interrupted, monkeypatch, capsys):
    calls = []
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *args, **kw: calls.append(None) or evaluate(*args, **kw))
    code_hash = provenance.code_hash
    monkeypatch.setattr(provenance, "code_hash", lambda file: "mended" if file.name == "loop.py" else code_hash(file))
    capsys.readouterr()
    assert result(run(workspace, **OFTEN)) == interrupted and len(calls) == 4
    shown = capsys.readouterr().err
    assert "starts again" in shown and "training/loop.py" in shown and "(now mended)" in shown
    assert "CBML_RESUME=always goes on" in shown

    # With the first code again, its checkpoint is still there.
    monkeypatch.setattr(provenance, "code_hash", code_hash)
    calls.clear()
    assert result(run(workspace, **OFTEN)) == interrupted and len(calls) == 2


def test_a_run_goes_on_with_other_packages_by_choice(workspace, interrupted, monkeypatch, capsys):
    calls = break_at(monkeypatch)
    monkeypatch.setattr(provenance, "packages", lambda *_: {"torch": "9.9"})
    monkeypatch.setenv("CBML_RESUME", "always")
    capsys.readouterr()
    assert result(run(workspace, **OFTEN)) == interrupted and len(calls) == 2
    assert "goes on from a checkpoint that was made with" in (shown := capsys.readouterr().err)
    assert "(now 9.9)" in shown and "continues after iteration 3" in shown


def test_a_run_starts_again_by_choice(workspace, interrupted, monkeypatch):
    calls = break_at(monkeypatch)
    monkeypatch.setenv("CBML_RESUME", "never")
    assert result(run(workspace, **OFTEN)) == interrupted and len(calls) == 4


def test_evaluation_takes_the_checkpoint_when_it_has_done_its_work(workspace, monkeypatch):
    """Training need not begin again after a crash of evaluate, and does when it is wanted after an evaluation."""
    folder = run(workspace)
    expected, calls = result(folder), break_at(monkeypatch)
    for function in ("embed", "hand_over"):
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, function, lambda *_, **__: (_ for _ in ()).throw(RuntimeError("crash")))
            with pytest.raises(RuntimeError, match="crash"):
                evaluate_cell(folder, workspace)
        shutil.rmtree(folder)
        assert result(run(workspace)) == expected and not calls
    evaluate_cell(folder, workspace)
    assert not checkpoints()
    assert result(run(workspace)) == expected and len(calls) == 4


def test_checkpoints_take_a_bounded_share_of_the_time(workspace, monkeypatch):
    written = []
    write = checkpoint.write_tensors
    monkeypatch.setattr(
        checkpoint, "write_tensors", lambda path, state: written.append(path.stem) or write(path, state)
    )
    monkeypatch.setattr(checkpoint, "SHARE", 1e-6)
    rare = from_the_beginning(workspace, **OFTEN)
    assert written.count("state") == 2  # the first and the last
    monkeypatch.setattr(checkpoint, "SHARE", 1.0)
    written.clear()
    assert from_the_beginning(workspace, **OFTEN) == rare and written.count("state") == 6


def test_weights_that_no_state_names_are_deleted(tmp_path):
    kept = Checkpoint(tmp_path)
    for name in ("best-2", "best-4", "kept-3"):
        kept.keep(name, {"a": torch.zeros(2)})
    kept.write({"iteration": 4}, weights=("best-4", "kept-3"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best-4.pt", "kept-3.pt", "state.pt"]
    assert kept.read() == {"iteration": 4}


def test_how_the_optimizer_ran_elsewhere_does_not_decide_how_it_runs_here(workspace, interrupted):
    """A checkpoint of another device may say `fused` where this one has no such kernel."""
    content = torch.load(state(), weights_only=True)
    for group in content["optimizer"]["param_groups"]:
        group |= {"fused": "elsewhere", "foreach": "elsewhere", "capturable": "elsewhere"}
    torch.save(content, state())
    assert result(run(workspace, **OFTEN)) == interrupted


def test_two_processes_on_one_cell_both_end_with_its_result(workspace):
    expected = from_the_beginning(workspace)
    shutil.rmtree("runs")
    processes = [
        subprocess.Popen(train_command(), env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert sum("another process trains it, waiting" in error for error in errors) >= 1
    assert result(Path("runs/glyphs/resnet18-cbml_log-16-0")) == expected


def test_a_checkpoint_is_not_removed_while_a_process_holds_it(tmp_path):
    folder = tmp_path / "cell"
    code = f"""
from pathlib import Path
from cbml.training import checkpoint
checkpoint.remove(Path({str(folder)!r}))
"""
    with acquire(folder, "cell", {"torch": "1"}) as held:
        held.write({"iteration": 1})
        process = subprocess.Popen(["python", "-c", code], env=environment(), stderr=subprocess.PIPE, text=True)
        assert "waiting" in process.stderr.readline()
        assert held.read() == {"iteration": 1}
        assert json.loads((held.folder / "made_with.json").read_text()) == {"torch": "1"}
    assert process.wait(60) == 0 and not folder.exists()
