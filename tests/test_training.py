"""Training: continues after any interruption to the same bits, and stops at what cannot go on."""

import functools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, TINY_RECIPE, environment, tiny_params

from cbml import tracking
from cbml.config import load_params
from cbml.datasets.loading import prefetch
from cbml.errors import UserError
from cbml.evaluation.cell import evaluate_cell
from cbml.losses import Loss
from cbml.training import cell, loop, run_cell

CELL = ("glyphs", "resnet18", "cbml_log", 16, 0)


def run(state, **changes):
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params(**changes)))
    params = load_params()
    (loss,) = params.loss
    return run_cell(params.cell("glyphs", "resnet18", loss, 16, params.seed[0]), state=state)


def without_checkpoints(folder):
    """The same, after `evaluate` would have removed the checkpoints."""
    shutil.rmtree(".checkpoints")
    return result(folder)


def result(folder):
    """All of a run that must not depend on how often it was interrupted."""
    return (
        json.loads((folder / "run.json").read_text())["final_weights_sha256"],
        (folder / "losses.csv").read_text(),
        (folder / "validations.csv").read_text(),
    )


def test_a_run_leaves_all_of_its_results_and_its_evaluation_no_checkpoint(project):
    folder = run(project)
    losses, validations = pd.read_csv(folder / "losses.csv"), pd.read_csv(folder / "validations.csv")
    assert losses.iteration.tolist() == [1, 2, 3, 4, 5, 6] and validations.iteration.tolist() == [0, 2, 4, 6]
    terms = losses[["loss_positive", "loss_negative", "loss_variance"]].sum(1)
    assert torch.allclose(torch.tensor(terms), torch.tensor(losses.loss), rtol=1e-5)
    best = json.loads((folder / "run.json").read_text())["iterations"]["best_on_test"]
    trained = validations[validations.iteration > 0]
    assert best == trained.iteration[trained.recall_at_1.idxmax()]
    assert (folder / "best_on_test.pt").is_file() == (best != 6)
    checkpoint = project / ".checkpoints" / json.loads((folder / "run.json").read_text())["checkpoint"]
    assert checkpoint.is_file()  # until DVC has recorded the stage
    evaluate_cell(folder, state=project)
    assert not [path for path in (project / ".checkpoints").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("loss", ["cbml_log", "softtriple", "xbm_contrastive"])
def test_broken_off_at_any_iteration_it_ends_with_the_same_bits(project, monkeypatch, loss):
    loss = {loss: yaml.safe_load((ROOT / "conf" / "loss" / f"{loss}.yaml").read_text())[loss]}
    recipe = {"tiny": TINY_RECIPE | {"checkpoint_every": 1}}
    unbroken = without_checkpoints(run(project, loss=loss, recipe=recipe))
    validate, calls = loop.evaluate, []

    def evaluate_once_more(*args, **kwargs):
        calls.append(None)
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return validate(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", evaluate_once_more)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(project, loss=loss, recipe=recipe)
    assert result(run(project, loss=loss, recipe=recipe)) == unbroken
    assert len(calls) == 6  # 0, 2 (broken) — 2, 4 (broken) — 4, 6: nothing was done twice


def test_validated_is_the_run_on_all_classes_as_long_as_held_out_classes_say(project, validating):
    folder = run(project, recipe={"tiny": validating})
    facts = json.loads((folder / "run.json").read_text())
    selection = pd.read_csv(folder / "selection.csv")
    assert selection.iteration.tolist() == [0, 2, 4, 6] and set(selection.queries) == {2 * 6}
    trained = selection[selection.iteration > 0]
    chosen = facts["iterations"]["validated"]
    assert chosen == trained.iteration[trained.map_at_r.idxmax()]
    metrics = evaluate_cell(folder, state=project)
    assert metrics["validated"]["iteration"] == chosen and metrics["validated"]["queries"] == 6 * 6
    assert not [path for path in (project / ".checkpoints").iterdir() if path.suffix != ".lock"]

    kept = folder / ("final.pt" if chosen == 6 else "validated.pt")
    digest = cell.weights_sha256(torch.load(kept, weights_only=True))
    short = run(project, recipe={"tiny": TINY_RECIPE | {"iterations": chosen}})
    assert digest == json.loads((short / "run.json").read_text())["final_weights_sha256"]
    assert not (short / "selection.csv").exists()


def test_selection_does_not_touch_the_other_protocols_and_survives_interruptions(project, validating, monkeypatch):
    plain = without_checkpoints(run(project, recipe={"tiny": TINY_RECIPE}))
    validate, calls = loop.evaluate, []

    def evaluate_but_break(*args, **kwargs):
        calls.append(None)
        if len(calls) in (3, 7):  # once in each half
            raise KeyboardInterrupt
        return validate(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", evaluate_but_break)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(project, recipe={"tiny": validating})
    assert result(run(project, recipe={"tiny": validating})) == plain
    assert len(calls) == 4 + 4 + 2  # nothing was done twice but what broke


def test_selection_needs_the_lists_that_it_is_made_on(project):
    with pytest.raises(UserError, match="train_without_validation.txt does not exist"):
        run(project, recipe={"tiny": TINY_RECIPE | {"select_by": "recall_at_1"}})


def test_batches_made_ahead_change_nothing(project, monkeypatch):
    """What a GPU does that the images are not on: batches of later iterations in other threads, also after a break."""
    recipe = {"tiny": TINY_RECIPE | {"checkpoint_every": 1}}
    expected = without_checkpoints(run(project, recipe=recipe))
    monkeypatch.setattr(loop, "load", lambda make, items, *_: prefetch(make, items, 3))
    validate, calls = loop.evaluate, []

    def evaluate_unless_second(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", evaluate_unless_second)
    with pytest.raises(KeyboardInterrupt):
        run(project, recipe=recipe)
    assert result(run(project, recipe=recipe)) == expected


def test_the_share_of_time_spent_on_batches_is_logged(project, monkeypatch):
    rows, load = [], loop.load
    monkeypatch.setattr(tracking.Run, "log", lambda self, new: rows.extend(new))

    def slow_load(*args):
        for batch in load(*args):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(loop, "load", slow_load)
    run(project, recipe={"tiny": TINY_RECIPE | {"iterations": 2, "checkpoint_every": 2}})
    (speed,) = [row for row in rows if "data_share" in row]
    assert speed["iteration"] == 2 and speed["images_per_second"] < 8 / 0.5
    seconds = 2 * 8 / speed["images_per_second"]
    assert 1.0 <= speed["data_share"] * seconds < seconds


def train_command(*options):
    """The command of the stage `train` for the tiny cell, with some of its options replaced."""
    axes = [
        "--dataset",
        "glyphs",
        "--backbone",
        "resnet18",
        "--loss",
        "cbml_log",
        "--embedding-dim",
        "16",
        "--seed",
        "0",
    ]
    return [sys.executable, "-m", "pipeline.train", *axes, *options]


def test_killed_it_continues_to_the_same_bits(project):
    recipe = {"tiny": TINY_RECIPE | {"iterations": 40, "validate_every": 20}}
    unbroken = without_checkpoints(run(project, recipe=recipe))
    (project / "runs").rename(project / "unbroken")
    command = train_command()
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((project / ".checkpoints").glob("*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (project / "runs").exists()
    again = subprocess.run(command, env=environment(), stderr=subprocess.PIPE, text=True, check=True)
    assert "continues after iteration" in again.stderr
    assert result(project / "runs" / "glyphs" / "resnet18-cbml_log-16-0") == unbroken


def test_a_changed_parameter_does_not_continue_the_old_run(project, monkeypatch):
    expected = without_checkpoints(run(project, seed=[3]))
    monkeypatch.setattr(loop, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(project)
    monkeypatch.undo()
    monkeypatch.chdir(project)
    assert result(run(project, seed=[3])) == expected != result(run(project))


class Diverging(Loss):
    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def compute(self, embeddings, labels):
        self.calls += 1
        return {"loss": embeddings.sum() * (float("nan") if self.calls == self.at else 1.0)}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_iteration(project, monkeypatch):
    monkeypatch.setattr(cell, "build_loss", lambda *_, **__: Diverging(at=3))
    with pytest.raises(UserError, match=r"the loss is not finite at iteration 3 .*lower recipe\.tiny\.lr"):
        run(project)
    assert not (project / "runs").exists()


def test_no_iterations_is_the_untrained_network(project):
    folder = run(project, recipe={"tiny": TINY_RECIPE | {"iterations": 0}})
    assert pd.read_csv(folder / "validations.csv").iteration.tolist() == [0]
    assert not (folder / "best_on_test.pt").exists()


def test_the_learning_rate_follows_its_steps(project):
    folder = run(project, recipe={"tiny": TINY_RECIPE | {"lr": 1e-3, "lr_steps": [2, 4]}})
    assert pd.read_csv(folder / "losses.csv").lr.tolist() == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)


def test_a_batch_of_more_classes_than_exist(project):
    with pytest.raises(UserError, match="= 8 classes a batch, but the training list has 6"):
        run(project, recipe={"tiny": TINY_RECIPE | {"batch_size": 16}})


@pytest.mark.parametrize(
    "line, message",
    [
        ("images/001.X/nothing.png,0", r"train\.txt, line 1: .*nothing\.png does not exist"),
        ("images.txt,0", r"images\.txt: not an image that Pillow can read"),
        ("no label", r"train\.txt, line 1: 'no label'; expected"),
    ],
)
def test_a_list_with_a_bad_image_stops_before_anything_is_trained(project, line, message):
    lists = project / "lists"
    target = lists.resolve()
    lists.unlink()
    (lists / "glyphs").mkdir(parents=True)
    for file in (target / "glyphs").iterdir():
        text = file.read_text()
        (lists / "glyphs" / file.name).write_text(f"{line}\n{text}" if file.name == "train.txt" else text)
    with pytest.raises(UserError, match=message):
        run(project)
    assert not list((project / ".checkpoints").glob("*.pt"))


def test_weights_that_do_not_fit_or_exist(project):
    def with_weights(path):
        return {"resnet18": tiny_params()["backbone"]["resnet18"] | {"weights": path}}

    with pytest.raises(UserError, match="nowhere.pth"):
        run(project, backbone=with_weights("nowhere.pth"))
    torch.save({"conv1.weight": torch.zeros(1)}, project / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth do not fit"):
        run(project, backbone=with_weights("other.pth"))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--loss", "cmbl"), "error: params.yaml: loss 'cmbl' is not there; allowed: cbml_log"),
        (("--backbone", "vgg"), "error: params.yaml: backbone 'vgg' is not there; allowed: resnet18"),
        (("--dataset", "sop"), "error: params.yaml: dataset 'sop' is not there; allowed: glyphs"),
    ],
)
def test_the_script_ends_with_one_line(project, options, message):
    done = subprocess.run(train_command(*options), capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and done.stderr.strip() == message


def test_half_precision_and_memory_format_leave_the_loss_in_float32(project, monkeypatch):
    seen = []

    class Watching(Diverging):
        def terms(self, embeddings, labels):
            seen.append(embeddings.dtype)
            assert (embeddings.norm(dim=1) - 1).abs().max() < 1e-5
            return super().terms(embeddings, labels)

    monkeypatch.setattr(cell, "build_loss", lambda *_, **__: Watching(at=None))
    run(project, recipe={"tiny": TINY_RECIPE | {"precision": "bf16-mixed", "channels_last": True}})
    assert seen == [torch.float32] * 6


def test_compile_changes_nothing_but_speed(project, monkeypatch):
    monkeypatch.setattr(loop, "_compiler_works", lambda device: True)
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    names = torch.load(run(project, recipe={"tiny": TINY_RECIPE | {"compile": True}}) / "final.pt")
    assert names.keys() == torch.load(run(project) / "final.pt").keys()


def test_without_a_compiler_it_runs_uncompiled_and_says_so(project, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found\ndetails")

    monkeypatch.setattr(torch, "compile", no_compiler)
    compiled = result(run(project, recipe={"tiny": TINY_RECIPE | {"compile": True}}))
    assert (
        "compile: not possible here, running without (RuntimeError: No working C++ compiler found)"
        in capsys.readouterr().err
    )
    assert compiled == result(run(project))
