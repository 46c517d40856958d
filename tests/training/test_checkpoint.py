"""Checkpoints: what is damaged or of other code is not continued, and two processes do not meet."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    TINY_RECIPE,
    VALIDATING,
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
from cbml.errors import UserError, run_main
from cbml.files import read_tensors
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
    assert sum("another process trains or evaluates it, waiting" in error for error in errors) >= 1
    assert result(Path("runs/glyphs/resnet18-cbml_log-16-0")) == expected


def test_a_checkpoint_is_not_removed_while_a_process_holds_it(tmp_path):
    folder = tmp_path / "cell"
    code = f"""
from pathlib import Path
from cbml.training import checkpoint
with checkpoint.removing(Path({str(folder)!r})) as waited:
    assert waited
"""
    with acquire(folder, "cell", {"torch": "1"}) as held:
        held.write({"iteration": 1})
        process = subprocess.Popen(["python", "-c", code], env=environment(), stderr=subprocess.PIPE, text=True)
        assert "waiting" in process.stderr.readline()
        assert held.read() == {"iteration": 1}
        assert json.loads((held.folder / "made_with.json").read_text()) == {"torch": "1"}
    assert process.wait(60) == 0 and not folder.exists()


SHORT = {
    "memory": MemoryError(),
    "memory, in PyTorch's words": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "EIO": OSError(errno.EIO, "Input/output error"),
    "EACCES": PermissionError(errno.EACCES, "Permission denied"),
    "EMFILE": OSError(errno.EMFILE, "Too many open files"),
    "ESTALE": OSError(errno.ESTALE, "Stale file handle"),
    "ENOMEM": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize("reason", SHORT)
def test_a_checkpoint_that_cannot_be_read_now_is_as_good_as_ever(tmp_path, monkeypatch, reason):
    def fail(*_, **__):
        raise SHORT[reason]

    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as kept:
        kept.write({"iteration": 1})
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", fail)
        with pytest.raises(SystemExit) as end:
            run_main(lambda: acquire(tmp_path / "cell", "cell", {"torch": "1"}).__enter__())
    assert end.value.code.startswith("error: ") and "damaged (" not in end.value.code and "\n" not in end.value.code
    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as kept:
        assert kept.read() == {"iteration": 1}


def test_too_little_memory_deletes_no_checkpoint(tmp_path):
    """Under a real limit, wherever it strikes."""
    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as kept:
        kept.write({"tensor": torch.zeros(2**26)})
    code = f"""
import resource, sys
from pathlib import Path
from cbml.errors import run_main
from cbml.training.checkpoint import acquire
used = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
run_main(lambda: acquire(Path({str(tmp_path / "cell")!r}), "cell", {{"torch": "1"}}).__enter__())
"""
    for room in (1, 60, 200):
        done = subprocess.run(
            [sys.executable, "-c", code, str(room)], env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 1 and done.stderr.startswith("error: too little memory"), done.stderr
        assert done.stderr.count("\n") == 1
    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as kept:
        assert kept.read()


def test_what_is_damaged_is_set_aside_and_not_deleted(tmp_path, capsys):
    for number in (1, 2):
        with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as kept:
            kept.write({"iteration": number})
        (kept.folder / "state.pt").write_bytes(b"damaged %d" % number)
    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as kept:
        assert kept.read() is None
    asides = sorted((tmp_path / "cell").glob(".damaged-*"))
    assert [(aside / "state.pt").read_bytes() for aside in asides] == [b"damaged 1", b"damaged 2"]
    assert all(str(aside) in capsys.readouterr().err for aside in asides[1:])


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"damaged")])
def test_weights_that_a_run_will_need_are_looked_at_when_it_goes_on(workspace, interrupted, capsys, damage):
    (best,) = (file for file in checkpoints() if file.name.startswith("best-"))
    damage(best)
    capsys.readouterr()
    assert result(run(workspace, **OFTEN)) == interrupted
    assert f"starts again: {best.resolve()}: damaged" in capsys.readouterr().err
    for file in Path("runs/glyphs/resnet18-cbml_log-16-0").glob("*.pt"):
        read_tensors(file, "train")


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"damaged")])
@pytest.mark.parametrize("name", ["best-*.pt", "kept-*.pt", "selection/state.pt", "selection/best-*.pt"])
def test_weights_that_a_finished_run_will_be_made_of_are_looked_at(workspace, capsys, name, damage):
    """Those that end as `best_on_test.pt` and `validated.pt`, and of the part that selects an iteration."""
    folder = run(workspace, recipe=VALIDATING)
    unbroken = {file.name: file.read_bytes() for file in folder.glob("*.pt")}
    (file,) = Path().glob(f".checkpoints/*/*/{name}")
    damage(file)
    begins = name == "selection/state.pt" and not file.exists()  # as the part that has not begun
    shutil.rmtree(folder)
    capsys.readouterr()
    run(workspace, recipe=VALIDATING)
    assert (f"starts again: {file.resolve()}: damaged" in capsys.readouterr().err) == (not begins)
    assert {file.name: file.read_bytes() for file in folder.glob("*.pt")} == unbroken


def test_a_folder_where_the_state_belongs_is_to_be_moved_away_before_anything_is_trained(workspace, interrupted):
    file = state()
    file.rename(file.with_name("moved"))
    file.mkdir()
    with pytest.raises(UserError, match=r"state\.pt: a folder, expected a file; move it away"):
        run(workspace, **OFTEN)


def test_weights_that_went_away_during_a_run_are_missed_by_the_next(tmp_path):
    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as kept:
        kept.keep("best-1", {"a": torch.zeros(2)})
        kept.weights("best-1").unlink()
        kept.write({"iteration": 2}, weights=("best-1", "kept-9"))
    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as again:
        assert again.read() is None


@pytest.mark.parametrize("content", [None, "{", "[]", "3", '{"torch": ["9"]}'])
@pytest.mark.parametrize("resume", [None, "always"])
def test_damage_in_a_checkpoint_of_other_code_stops_nothing(tmp_path, monkeypatch, content, resume):
    with acquire(tmp_path / "cell", "cell", {"torch": "9"}) as other:
        other.write({"iteration": 9})
    (other.folder / "made_with.json").unlink()
    if content is not None:
        (other.folder / "made_with.json").write_text(content)
    if resume:
        monkeypatch.setenv("CBML_RESUME", resume)
    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as own:
        assert own.read() == ({"iteration": 9} if resume else None)
        assert json.loads((own.folder / "made_with.json").read_text()) == {"torch": "1"}


def test_a_checkpoint_of_other_code_that_is_not_continued_is_not_read(tmp_path):
    with acquire(tmp_path / "cell", "cell", {"torch": "9"}) as other:
        other.write({"iteration": 9})
    (other.folder / "state.pt").write_bytes(b"damaged")
    with acquire(tmp_path / "cell", "cell", {"torch": "1"}) as own:
        assert own.read() is None
    assert (other.folder / "state.pt").read_bytes() == b"damaged"
