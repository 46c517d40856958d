"""Training: continues after any interruption to the same bits, and stops at what cannot go on."""

import functools
import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from helpers import (
    TINY_RECIPE,
    VALIDATING,
    break_at,
    broken,
    checkpoints,
    ended,
    ending,
    entry,
    environment,
    forked,
    from_the_beginning,
    record,
    result,
    run,
    tiny_params,
    train_command,
)

from cbml import network
from cbml.data.images import EncodedImages, PackedImages
from cbml.data.loading import prefetch
from cbml.data.open import Data
from cbml.errors import UserError
from cbml.files import read_tensors
from cbml.losses import Loss
from cbml.models import EmbeddingModel
from cbml.models.weights import weights_sha256
from cbml.samplers import clusters
from cbml.spec.params import load_cell
from cbml.stages import train as stages_train
from cbml.stages.evaluate import evaluate_cell
from cbml.tracking import run as tracking
from cbml.training import device, loop


def test_a_run_leaves_all_of_its_results_and_its_evaluation_no_checkpoint(workspace):
    folder = run(workspace)
    losses, validations = pd.read_csv(folder / "losses.csv"), pd.read_csv(folder / "validations.csv")
    assert losses.iteration.tolist() == [1, 2, 3, 4, 5, 6] and validations.iteration.tolist() == [0, 2, 4, 6]
    terms = losses[["loss_positive", "loss_negative", "loss_variance"]].sum(1)
    assert torch.allclose(torch.tensor(terms), torch.tensor(losses.loss), rtol=1e-5)
    best = record(folder)["iterations"]["best_on_test"]
    trained = validations[validations.iteration > 0]
    assert best == trained.iteration[trained.recall_at_1.idxmax()]
    assert (folder / "best_on_test.pt").is_file() == (best != 6)
    assert checkpoints()  # until DVC has recorded the stage
    evaluate_cell(folder, workspace)
    assert not checkpoints()


def test_the_record_says_what_was_set_and_what_took_part(workspace):
    facts = record(run(workspace))
    assert facts["key"].startswith("resnet18-cbml_log-16-0-") and facts["numerics"] == {
        "type": "cpu",
        "precision": "32-true",
        "tf32": False,
        "cudnn_benchmark": False,
        "deterministic": True,
        "processes": 1,
    }
    assert {"losses/cbml.py", "losses/base.py", "training/loop.py", "models/embedding_model.py"} <= facts["code"].keys()
    assert "losses/center.py" not in facts["code"] and "samplers/clusters.py" not in facts["code"]
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_switches_are_set_for_the_run_alone(workspace, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.use_deterministic_algorithms(False)
    (cell,) = workspace.cells("glyphs")
    with device.device_context(cell.recipe):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.allow_tf32
    with pytest.raises(KeyboardInterrupt), device.device_context(cell.recipe):
        raise KeyboardInterrupt
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.allow_tf32


METHODS = ["abier", "deml", "divide_conquer", "hdc", "horde", "mic"]
WITHOUT_LABELS = ["cbml_clusters", "isif", "moco", "multi_similarity_clusters", "stml"]


def method(name, **recipe):
    """A method on the tiny cell; batches that look at the images do so every three iterations."""
    config = entry("loss", name)
    small = {"horde": {"width": 64}, "moco": {"queue": 16}, "stml": {"projection_dim": 8, "neighbours": 4}}
    config |= small.get(name, {})
    if "batches" in config:
        config["batches"]["refresh"] = 0.375 if config["batches"]["type"] in ("instances", "neighbours") else 0.75
        config["batches"] |= {"clusters": {"k": 6}, "neighbours": {"count": 2}}.get(config["batches"]["type"], {})
    size = 54 if name == "deml" else 48  # which has nine equal parts
    return {"loss": {name: config}, "embedding_dim": [size], "recipe": TINY_RECIPE | recipe}


@pytest.mark.parametrize("loss", ["cbml_log", "softtriple", "xbm_contrastive", *METHODS, *WITHOUT_LABELS])
def test_broken_off_at_any_iteration_it_ends_with_the_same_bits(workspace, monkeypatch, loss):
    changes = method(loss, checkpoint_every=1)
    unbroken = from_the_beginning(workspace, **changes)
    calls = break_at(monkeypatch, 2, 4)
    broken(workspace, **changes)
    broken(workspace, **changes)
    assert result(run(workspace, **changes)) == unbroken
    assert len(calls) == 6  # 0, 2 (broken) — 2, 4 (broken) — 4, 6: nothing was done twice


@pytest.mark.parametrize("loss", WITHOUT_LABELS)
def test_labels_of_training_images_change_no_bit(workspace, monkeypatch, loss):
    changes = method(loss)
    monkeypatch.setattr(Data, "_check", lambda *_: None)  # which would notice the labels
    expected = weights_of(run(workspace, **changes))
    lists = Path("lists").resolve()
    Path("lists").unlink()
    shutil.copytree(lists, "lists")
    train_list = Path("lists/glyphs/train.txt")
    paths = [line.rpartition(",")[0] for line in train_list.read_text().splitlines()]
    for labels in ([0] * len(paths), [number % 6 for number in range(len(paths))]):
        train_list.write_text("".join(f"{path},{label}\n" for path, label in zip(paths, labels, strict=True)))
        shutil.rmtree(".checkpoints")
        assert weights_of(run(workspace, **changes)) == expected


def weights_of(folder):
    return weights_sha256(read_tensors(folder / "final.pt", "train"))


@pytest.mark.parametrize("loss", METHODS + WITHOUT_LABELS)
def test_what_only_training_has_does_not_reach_the_trained_network(workspace, loss):
    folder = run(workspace, **method(loss, iterations=1))
    cell = load_cell(folder / "cell.yaml")
    state = read_tensors(folder / "final.pt", "train")
    assert {name.partition(".")[0] for name in state} == {"trunk", "head"}
    model = network.load(cell, folder / "final.pt")
    assert model(torch.zeros(1, 3, 20, 20)).shape == (1, cell.embedding_dim)


def test_validated_is_the_run_on_all_classes_as_long_as_held_out_classes_say(workspace):
    folder = run(workspace, recipe=VALIDATING)
    selection = pd.read_csv(folder / "selection.csv")
    assert selection.iteration.tolist() == [0, 2, 4, 6] and set(selection.queries) == {2 * 6}
    trained = selection[selection.iteration > 0]
    chosen = record(folder)["iterations"]["validated"]
    assert chosen == trained.iteration[trained.map_at_r.idxmax()]
    whole = (folder / "selection.csv").read_text()
    (folder / "selection.csv").write_text(whole[:7])
    with pytest.raises(UserError, match=r"selection\.csv: damaged"):
        evaluate_cell(folder, workspace)
    assert checkpoints()  # which has it whole
    (folder / "selection.csv").write_text(whole)
    metrics = evaluate_cell(folder, workspace)
    assert metrics["validated"]["iteration"] == chosen and metrics["validated"]["queries"] == 6 * 6
    assert not checkpoints()

    kept = folder / ("final.pt" if chosen == 6 else "validated.pt")
    digest = weights_sha256(torch.load(kept, weights_only=True))
    short = run(workspace, recipe=TINY_RECIPE | {"iterations": chosen})
    assert digest == record(short)["final_weights_sha256"]
    assert not (short / "selection.csv").exists()


def test_selection_does_not_touch_the_other_protocols_and_survives_interruptions(workspace, monkeypatch):
    plain = from_the_beginning(workspace)
    calls = break_at(monkeypatch, 3, 7)  # once in each half
    broken(workspace, recipe=VALIDATING)
    broken(workspace, recipe=VALIDATING)
    assert result(run(workspace, recipe=VALIDATING)) == plain
    assert len(calls) == 4 + 4 + 2  # nothing was done twice but what broke


def test_the_share_of_validation_classes_concerns_only_runs_that_ask_for_them(workspace):
    """It is a part of `select_by`: changing it changes no other cell, and no list."""
    keys = set()
    for share in (0.34, 0.5):
        recipe = VALIDATING | {"select_by": {"metric": "map_at_r", "validation_classes": share}}
        Path("params.yaml").write_text(yaml.safe_dump(tiny_params(recipe=recipe)))
        keys.add(workspace.cells("glyphs")[0].key("data", None))
    assert len(keys) == 2
    recipe = TINY_RECIPE | {"select_by": {"metric": "recall_at_1", "validation_classes": 0.9}}
    with pytest.raises(UserError, match="validation_classes=0.9 holds out 5 of 6 training classes"):
        run(workspace, recipe=recipe)


def test_batches_made_ahead_change_nothing(workspace, monkeypatch):
    """What a GPU does that the images are not on: batches of later iterations in other threads, also after a break."""
    recipe = TINY_RECIPE | {"checkpoint_every": 1}
    expected = from_the_beginning(workspace, recipe=recipe)
    monkeypatch.setattr(loop, "load_batches", lambda make, items, *_: prefetch(make, items, 3))
    break_at(monkeypatch, 2)
    broken(workspace, recipe=recipe)
    assert result(run(workspace, recipe=recipe)) == expected


def test_the_share_of_time_spent_on_batches_is_logged(workspace, monkeypatch):
    rows, load = [], loop.load_batches
    monkeypatch.setattr(tracking.Run, "log", lambda self, new, **_: rows.extend(new))

    def slow_load(*args):
        for batch in load(*args):
            time.sleep(0.5)
            yield batch

    monkeypatch.setattr(loop, "load_batches", slow_load)
    run(workspace, recipe=TINY_RECIPE | {"iterations": 2, "checkpoint_every": 2})
    (speed,) = [row for row in rows if "train_data_percent" in row]
    assert speed["iteration"] == 2 and speed["train_images_per_second"] < 8 / 0.5
    seconds = 2 * 8 / speed["train_images_per_second"]
    assert 1.0 <= speed["train_data_percent"] / 100 * seconds < seconds


@pytest.mark.slow
def test_killed_it_continues_to_the_same_bits(workspace):
    recipe = TINY_RECIPE | {"iterations": 40, "validate_every": 20}
    unbroken = from_the_beginning(workspace, recipe=recipe)
    Path("runs").rename("unbroken")
    process = subprocess.Popen(train_command(), env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(file.name == "state.pt" for file in checkpoints()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not Path("runs").exists()
    again = subprocess.run(train_command(), env=environment(), stderr=subprocess.PIPE, text=True, check=True)
    assert "continues after iteration" in again.stderr
    assert result(Path("runs/glyphs/resnet18-cbml_log-16-0")) == unbroken


@pytest.mark.slow
def test_killed_with_streams_it_continues_to_the_same_bits(workspace, monkeypatch, capsys):
    """At 68 pixels, of which the last map is 3 × 3: the later streams see crops."""
    changes = method("deml", checkpoint_every=1, resize=72, crop=68, iterations=4, validate_every=4)
    lr_scale = loop.lr_scale

    def killed(recipe, iteration):
        if iteration == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return lr_scale(recipe, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "lr_scale", killed)
        assert ending(forked(lambda: run(workspace, **changes))) == -signal.SIGKILL
    continued = result(run(workspace, **changes))
    assert "continues after iteration 3" in capsys.readouterr().err
    assert continued == from_the_beginning(workspace, **changes)


MOMENTS = {  # where a run on clusters that looks at the images before iterations 1 and 4 is killed
    "in a segment": (loop, "lr_scale", lambda recipe, iteration: iteration == 6),
    "at a refresh": (clusters, "kmeans", lambda *_, starts, **__: starts == 1),
    "between": (clusters.Clusters, "segment", lambda batches, number: number == 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_on_clusters_it_continues_to_the_same_bits(workspace, monkeypatch, capsys, moment):
    owner, name, now = MOMENTS[moment]
    function, changes = getattr(owner, name), method("cbml_clusters", checkpoint_every=1)

    def killed(*args, **kwargs):
        if now(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        assert ending(forked(lambda: run(workspace, **changes))) == -signal.SIGKILL
    continued = result(run(workspace, **changes))
    assert f"continues after iteration {5 if moment == 'in a segment' else 3}" in capsys.readouterr().err
    assert continued == from_the_beginning(workspace, **changes)


def test_a_changed_parameter_does_not_continue_the_old_run(workspace, monkeypatch):
    expected = from_the_beginning(workspace, seed=[3])
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        broken(workspace)
    assert result(run(workspace, seed=[3])) == expected != result(run(workspace))


class Diverging(Loss):
    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def compute(self, batch):
        self.calls += 1
        return {"loss": batch.embeddings.sum() * (float("nan") if self.calls == self.at else 1.0)}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_iteration(workspace, monkeypatch):
    monkeypatch.setattr(network, "build_loss", lambda *_, **__: Diverging(at=3))
    with pytest.raises(UserError, match=r"16-0-\w+: the loss is not finite at iteration 3 .*lower the recipe's lr"):
        run(workspace)
    assert not Path("runs").exists()


def test_no_iterations_is_the_untrained_network(workspace):
    folder = run(workspace, recipe=TINY_RECIPE | {"iterations": 0})
    assert pd.read_csv(folder / "validations.csv").iteration.tolist() == [0]
    assert not (folder / "best_on_test.pt").exists()
    assert evaluate_cell(folder, workspace)["final"]["iteration"] == 0


def test_the_lower_rate_starts_at_its_step(workspace):
    folder = run(workspace, recipe=TINY_RECIPE | {"lr": 1e-3, "lr_steps": [3, 5]})
    assert pd.read_csv(folder / "losses.csv").lr.tolist() == pytest.approx([1e-3] * 2 + [1e-4] * 2 + [1e-5] * 2)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"warmup": 4}, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"schedule": "cosine"}, [1, 0.9330, 0.75, 0.5, 0.25, 0.0670]),
        ({"schedule": "cosine", "warmup": 2}, [0.5, 1, 1, 0.8536, 0.5, 0.1464]),
        ({"warmup": 2, "lr_steps": [5], "lr_gamma": 0.5}, [0.5, 1, 1, 1, 0.5, 0.5]),
    ],
)
def test_the_learning_rate_follows_its_schedule(workspace, changes, expected):
    folder = run(workspace, recipe=TINY_RECIPE | {"lr": 1e-3} | changes)
    assert (pd.read_csv(folder / "losses.csv").lr / 1e-3).tolist() == pytest.approx(expected, abs=1e-4)


def test_optimizers_differ_and_continue_to_the_same_bits(workspace, monkeypatch):
    results = set()
    for optimizer in ("adam", "adamw", "sgd"):
        recipe = TINY_RECIPE | {"optimizer": optimizer, "checkpoint_every": 1, "weight_decay": 0.1}
        unbroken = from_the_beginning(workspace, recipe=recipe)
        with monkeypatch.context() as patch:
            break_at(patch, 3)
            broken(workspace, recipe=recipe)
        assert result(run(workspace, recipe=recipe)) == unbroken
        results.add(unbroken)
    assert len(results) == 3


def one_step(workspace, **changes):
    """How far each parameter moves in one step of plain gradient descent."""
    recipe = TINY_RECIPE | {"optimizer": "sgd", "momentum": 0, "weight_decay": 0, "iterations": 1} | changes
    before = torch.load(run(workspace, recipe=recipe | {"iterations": 0}) / "final.pt")
    after = torch.load(run(workspace, recipe=recipe) / "final.pt")
    names = ("trunk.conv1.weight", "head.weight")
    return [after[name].double() - before[name].double() for name in names]


def test_the_head_has_a_learning_rate_of_its_own(workspace):
    (trunk, head), (same, faster) = one_step(workspace), one_step(workspace, head_lr_factor=10)
    assert torch.equal(trunk, same) and torch.allclose(faster, 10 * head, rtol=1e-2, atol=1e-6)


def test_attentions_have_the_rate_of_the_head(workspace):
    folder = run(workspace, **method("deml", iterations=1, head_lr_factor=7.0))
    (cell,) = workspace.cells("glyphs")
    model, criterion = network.build(cell, num_classes=6, root=workspace.root)
    groups = loop.parameter_groups(model, criterion, load_cell(folder / "cell.yaml").recipe)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 7e-3 if name.startswith(("head.", "trunk.attentions.")) else 1e-3
        assert rates[id(parameter)] == pytest.approx(expected), name


def test_gradients_are_clipped_together(workspace):
    (trunk, head), (small, small_head) = one_step(workspace), one_step(workspace, clip_norm=0.01)
    scale = small_head.norm() / head.norm()
    assert 0 < scale < 1 and torch.allclose(small, scale * trunk, rtol=0.05, atol=1e-6)
    for plain, clipped in zip((trunk, head), one_step(workspace, clip_norm=1e6), strict=True):
        assert torch.equal(plain, clipped)


def test_what_a_backbone_changes_in_the_recipe_is_said(workspace, capsys):
    entry = tiny_params()["backbone"]["resnet18"] | {"recipe": {"tiny": {"lr": 0.5}}}
    folder = run(workspace, backbone={"resnet18": entry})
    said = "recipe.lr is 0.5 by backbone.resnet18, not 0.001"
    keep = "(to keep that: -S '++backbone.resnet18.recipe.tiny.lr=0.001')"
    assert f"{said} {keep}" in capsys.readouterr().err
    assert pd.read_csv(folder / "losses.csv").lr.tolist() == [0.5] * 6


def test_a_vision_transformer_is_trained_at_its_own_size_which_is_said_or_at_any_that_is_set(workspace, capsys):
    pytest.importorskip("timm", reason="timm is not installed (pip install 'cbml[timm]')")
    vit = {"vit": {"type": "timm", "model": "test_vit", "arguments": {"img_size": 48}}}
    recipe = TINY_RECIPE | {"iterations": 1, "validate_every": 0}
    folder = run(workspace, backbone=vit, recipe=recipe)
    text = capsys.readouterr().err
    assert "recipe.crop is 48 by backbone.vit, not 20" in text and "recipe.resize is 50" in text
    assert evaluate_cell(folder, workspace)["final"]["queries"] == 36

    Path("conf/recipe").mkdir(parents=True)
    Path("conf/recipe/tiny.yaml").write_text(yaml.safe_dump(recipe))
    folder = run(workspace, backbone=vit, recipe=recipe | {"crop": 32, "resize": 40})
    assert "recipe.crop" not in capsys.readouterr().err
    assert torch.load(folder / "final.pt")["trunk.pos_embed"].shape[1] == 1 + (32 // 16) ** 2
    assert evaluate_cell(folder, workspace)["final"]["queries"] == 36


def test_without_a_network_it_says_how_to_name_a_file_of_weights(workspace, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    published = {"url": (tmp_path / "absent.pth").as_uri(), "sha256": "0" * 8}
    entry = tiny_params()["backbone"]["resnet18"] | {"weights": "imagenet", "published": published}
    hint = r"offline\? pass a local file: -S backbone.{}.weights=PATH"
    with pytest.raises(UserError, match=rf"^weights file:.* cannot be downloaded .*{hint.format('resnet18')}"):
        run(workspace, backbone={"resnet18": entry})
    with pytest.raises(UserError, match=r"no such file") as error:
        run(workspace, backbone={"resnet18": entry | {"weights": "absent.pth"}})
    assert "pass a local file" not in str(error.value)
    timm = pytest.importorskip("timm", reason="timm is not installed (pip install 'cbml[timm]')")
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: 1 / 0)
    with pytest.raises(UserError, match=rf"^timm model 'test_vit' cannot be had .*{hint.format('vit')}"):
        run(workspace, backbone={"vit": {"type": "timm", "model": "test_vit", "weights": "imagenet"}})


def test_colours_are_jittered_by_the_seed(workspace):
    plain, jittered, again = (
        result(run(workspace, recipe=TINY_RECIPE | {"color_jitter": jitter}))
        for jitter in (None, [0.4, 0.4, 0.4, 0.1], [0.4, 0.4, 0.4, 0.1])
    )
    assert jittered == again != plain


def test_a_batch_of_more_classes_than_exist(workspace):
    with pytest.raises(UserError, match="= 8 classes a batch, but the training list has 6"):
        run(workspace, recipe=TINY_RECIPE | {"batch_size": 16})


@pytest.mark.parametrize("name", ["train.txt", "test.txt"])
def test_a_list_that_was_cut_is_not_trained_on(workspace, name):
    run(workspace)
    shutil.rmtree(".checkpoints")
    lists = Path("lists").resolve()
    Path("lists").unlink()
    shutil.copytree(lists, "lists")
    file = Path("lists/glyphs") / name
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="the images or the lists in lists/glyphs have changed"):
        run(workspace)


@pytest.mark.parametrize(
    "line, message",
    [
        ("images/001.X/nothing.png,0", r"1 of 73 images cannot be read: .*No such file.*nothing\.png"),
        ("images.txt,0", r"images\.txt: not an image that Pillow can read"),
        ("no label", r"train\.txt: damaged \(line 1: 'no label'; expected"),
    ],
)
def test_a_list_with_a_bad_image_stops_before_anything_is_trained(workspace, line, message):
    lists = Path("lists")
    target = lists.resolve()
    lists.unlink()
    (lists / "glyphs").mkdir(parents=True)
    for file in (target / "glyphs").iterdir():
        text = file.read_text()
        (lists / "glyphs" / file.name).write_text(f"{line}\n{text}" if file.name == "train.txt" else text)
    with pytest.raises(UserError, match=message):
        run(workspace)
    assert not any(file.name == "state.pt" for file in checkpoints())


def test_weights_that_do_not_fit_or_exist(workspace):
    def with_weights(path):
        return {"resnet18": tiny_params()["backbone"]["resnet18"] | {"weights": path}}

    with pytest.raises(UserError, match="nowhere.pth"):
        run(workspace, backbone=with_weights("nowhere.pth"))
    torch.save({"conv1.weight": torch.zeros(1)}, "other.pth")
    with pytest.raises(UserError, match=r"other\.pth do not fit"):
        run(workspace, backbone=with_weights("other.pth"))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--loss", "cmbl"), "error: params.yaml: loss 'cmbl' is not there; allowed: cbml_log"),
        (("--backbone", "vgg"), "error: params.yaml: backbone 'vgg' is not there; allowed: resnet18"),
        (("--dataset", "sop"), "error: params.yaml: dataset 'sop' is not there; allowed: glyphs"),
    ],
)
def test_the_script_ends_with_one_line(project, capsys, options, message):
    assert ended(*train_command(*options)[2:]) == message and not capsys.readouterr().err


class Watching(Loss):
    """A loss that needs all of a batch, and remembers the type of each."""

    needs = ("raw", "features", "map", "teacher")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def compute(self, batch):
        for outputs in (batch, batch.teacher):
            for name in ("embeddings", "raw", "features", "map"):
                self.seen.add((name, getattr(outputs, name).dtype))
        return {"loss": (1 - batch.embeddings[:, 0]).sum()}


def types_in_the_trunk(workspace, monkeypatch, **recipe):
    """What the trunk computes in, of student and teacher, in training, looking at images, and evaluation."""
    found, where, compute, criterion = set(), [], EmbeddingModel.outputs, Watching()

    def outputs(self, images, wanted=()):
        who = "evaluation" if where else "student" if self.training else "teacher" if "raw" in wanted else "validation"
        hook = self.trunk.layer1.register_forward_hook(lambda _, __, value: found.add((who, value.dtype)))
        try:
            return compute(self, images, wanted)
        finally:
            hook.remove()

    monkeypatch.setattr(EmbeddingModel, "outputs", outputs)
    monkeypatch.setattr(tracking.Run, "log_model", lambda *_, **__: None)  # which serves in float32 everywhere
    monkeypatch.setattr(network, "build_loss", lambda *_, **__: criterion)
    loss = {"cbml_log": tiny_params()["loss"]["cbml_log"] | {"teacher": 0.9}}
    folder = run(workspace, loss=loss, recipe=TINY_RECIPE | recipe)
    where.append("evaluation")
    evaluate_cell(folder, workspace)
    return found, criterion.seen


@pytest.mark.parametrize("compiled", [False, True], ids=["as it is", "compiled"])
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_the_trunk_computes_in_the_precision_of_the_recipe_and_the_loss_in_float32(
    workspace, monkeypatch, precision, dtype, compiled
):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    inside, outside = types_in_the_trunk(
        workspace, monkeypatch, precision=precision, compile=compiled, channels_last=True
    )
    assert inside == {(who, dtype) for who in ("student", "teacher", "validation", "evaluation")}
    assert outside == {(name, torch.float32) for name in ("embeddings", "raw", "features", "map")}


def test_clusters_are_of_what_the_precision_gives(workspace, monkeypatch):
    seen, kmeans = [], clusters.kmeans

    def watched(points, *args, **kwargs):
        seen.append(points)
        return kmeans(points, *args, **kwargs)

    monkeypatch.setattr(clusters, "kmeans", watched)
    for precision in ("32-true", "bf16-mixed"):
        run(workspace, **method("cbml_clusters", precision=precision, iterations=1))
    exact, rounded = seen[0], seen[-1]
    assert exact.dtype == rounded.dtype == torch.float32
    assert 1e-4 < (exact - rounded).abs().max() < 0.05  # of unit vectors: bfloat16 has 8 bits


def test_a_run_in_bf16_stays_near_that_in_float32(workspace):
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        recipe = {"precision": precision, "iterations": 20, "lr": 1e-5, "freeze_bn": True}  # else differences grow
        folder = run(workspace, recipe=TINY_RECIPE | recipe)
        losses[precision] = pd.read_csv(folder / "losses.csv").loss
    difference = (losses["bf16-mixed"] / losses["32-true"] - 1).abs()
    assert 0 < difference.max() < 0.1


@pytest.mark.parametrize("loss", ["cbml_log", "hdc"])
def test_fresh_memory_that_is_not_filled_changes_no_bit(workspace, monkeypatch, loss):
    changes = method(loss) if loss in METHODS else {}
    expected, device_context = from_the_beginning(workspace, **changes), device.device_context

    @contextmanager
    def filling(recipe):
        with device_context(recipe) as fabric:
            assert not torch.utils.deterministic.fill_uninitialized_memory
            torch.utils.deterministic.fill_uninitialized_memory = True
            yield fabric

    monkeypatch.setattr(stages_train, "device_context", filling)
    assert from_the_beginning(workspace, **changes) == expected
    assert torch.utils.deterministic.fill_uninitialized_memory  # as it was


@pytest.mark.parametrize("loss", ["cbml_log", "deml"])
def test_compile_changes_nothing_but_speed(workspace, monkeypatch, loss):
    changes = method(loss, iterations=1) if loss in METHODS else {"recipe": TINY_RECIPE}
    expected = torch.load(run(workspace, **changes) / "final.pt")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    changes["recipe"] = changes["recipe"] | {"compile": True}
    assert torch.load(run(workspace, **changes) / "final.pt").keys() == expected.keys()


def test_without_a_compiler_it_runs_uncompiled_and_says_so(workspace, monkeypatch, capsys):
    def no_compiler(*_, **__):
        raise RuntimeError("No working C++ compiler found\ndetails")

    monkeypatch.setattr(torch, "compile", no_compiler)
    compiled = result(run(workspace, recipe=TINY_RECIPE | {"compile": True}))
    assert (
        "compile: not possible here, running without (RuntimeError: No working C++ compiler found)"
        in capsys.readouterr().err
    )
    assert compiled == result(run(workspace))


def some_images(count=2):
    return PackedImages(torch.zeros(3 * 64 * count, dtype=torch.uint8), torch.full((count, 2), 8), torch.zeros(count))


def test_images_that_the_gpu_has_no_room_for_stay_where_they_are(monkeypatch, capsys):
    def no_room(self, device):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**30))
    monkeypatch.setattr(PackedImages, "to", no_room)
    lists = [some_images(), some_images()]
    assert device.place(lists, torch.device("cuda")) == lists
    said = capsys.readouterr().err
    assert "no room on the GPU" in said and said.endswith("images: 4, 7.2e-07 GB decoded, in the host's memory\n")


def test_where_images_are_depends_on_their_size_and_is_said_in_one_line(monkeypatch, capsys, tmp_path):
    images = some_images()
    assert device.place([images], torch.device("cpu")) == [images]
    monkeypatch.setattr(os, "sysconf", lambda name: 25)  # 625 bytes of memory
    assert device.place([images, images], torch.device("cpu")) == [images, images]
    encoded = EncodedImages([tmp_path], images.sizes[:1], images.labels[:1], 8, "bilinear")
    assert device.place([images, encoded], torch.device("cpu")) == [images, encoded]
    memory, disk, files = capsys.readouterr().err.splitlines()
    assert memory.endswith("in the host's memory") and disk.endswith("on the disk, read as they are needed")
    assert files.endswith("decoded from their files as they are needed")


def test_only_a_part_of_the_decoded_images_goes_to_the_gpu():
    sizes = torch.tensor([[2, 3], [4, 1], [1, 1], [2, 2]])
    every = PackedImages(torch.arange(45, dtype=torch.uint8), sizes, torch.arange(4))
    part = every.subset(torch.tensor([3, 0, 1]), torch.tensor([7, 8, 9]))
    moved = part.to(torch.device("cpu"))
    assert moved.data.tolist() == [*range(30), *range(33, 45)] and moved.labels.tolist() == [7, 8, 9]
    for images in (part, moved):
        areas = images.sizes.prod(1)
        pixels = [images.data[3 * s :][: 3 * n].tolist() for s, n in zip(images.starts, areas, strict=True)]
        assert pixels == [[*range(33, 45)], [*range(18)], [*range(18, 30)]]
