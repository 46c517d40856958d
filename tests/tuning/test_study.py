"""Tuning: the same trials whatever interrupts them, each scored on classes that it was not trained on."""

import time

import numpy as np
import optuna
import pytest
import torch
import yaml
from helpers import TINY_RECIPE, ending, forked, tiny_params

from cbml import network
from cbml.errors import UserError
from cbml.models.embedding_model import OnFeatures
from cbml.schema import Range
from cbml.spec.params import Params
from cbml.tracking.run import log_study
from cbml.tracking.store import Store
from cbml.training.device import device_context
from cbml.training.features import Features
from cbml.tuning import study
from cbml.tuning.preset import near_an_end, trials_table, write_preset
from cbml.tuning.study import Budget, Problem, folds, open_study, run_study

SPACE = {"recipe.lr": Range(low=1e-4, high=1e-1, log=True), "margin": Range(low=0.0, high=0.3)}
BUDGET = Budget(trials=4, folds=2)


@pytest.fixture
def problem():
    params = Params.model_validate(tiny_params(recipe=TINY_RECIPE | {"train": "head", "iterations": 3}))
    (cell,) = params.cells("glyphs")
    generator = torch.Generator().manual_seed(0)
    labels = np.repeat(np.arange(8) * 2, 5)
    centres = torch.randn(8, 512, generator=generator).repeat_interleave(5, 0)
    points = (centres + torch.randn(40, 512, generator=generator)).half()
    images = Features(points, (points,), torch.arange(40), torch.from_numpy(labels))
    torch.manual_seed(0)
    model = OnFeatures(network.build(cell, num_classes=2, root=None)[0])
    return Problem(cell, SPACE, images, labels, model, "these")


def ran(problem, storage, budget=BUDGET):
    with device_context(problem.cell.recipe) as fabric:
        return run_study(problem, budget, storage, fabric)


def told(found):
    return [(trial.params, trial.value) for trial in found.trials if trial.state.name == "COMPLETE"]


def test_folds_hold_out_neighbouring_classes_each_once():
    labels = np.repeat([4, 7, 1, 9, 12], 3)
    found = [*folds(labels, 2)]
    assert [sorted(set(labels[each].tolist())) for each in found] == [[1, 4, 7], [9, 12]]
    assert np.sum(found, axis=0).tolist() == [1] * 15
    for count in (1, 3):
        with pytest.raises(UserError, match=f"folds: {count} of 5 training classes; allowed: from 2 to 2"):
            [*folds(labels, count)]


def test_the_published_constants_are_the_first_trial(problem, tmp_path):
    found = ran(problem, f"sqlite:///{tmp_path}/x.db")
    trials = told(found)
    assert trials[0][0] == {"recipe.lr": 1e-3, "margin": 0.1} and len(trials) == 4
    assert all(1e-4 <= params["recipe.lr"] <= 1e-1 and 0 <= params["margin"] <= 0.3 for params, _ in trials)
    assert all(0 < value <= 100 for _, value in trials) and len({value for _, value in trials}) > 1


def test_a_trial_is_scored_on_classes_that_it_was_not_trained_on(problem, tmp_path, monkeypatch):
    seen, train = [], study.train

    def watched(job, *args, **kwargs):
        seen.append((set(job.images.labels.tolist()), set(job.scored.labels.tolist())))
        return train(job, *args, **kwargs)

    monkeypatch.setattr(study, "train", watched)
    found = ran(problem, f"sqlite:///{tmp_path}/x.db", Budget(trials=1, folds=2))
    low, high = {0, 2, 4, 6}, {8, 10, 12, 14}
    assert seen == [(high, low), (low, high)]
    (trial,) = found.trials
    assert trial.value == pytest.approx(np.mean(trial.user_attrs["folds"]))


def test_each_trial_begins_with_the_same_network(problem, tmp_path):
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    one = ran(problem, f"sqlite:///{tmp_path}/x.db")
    other = ran(problem, f"sqlite:///{tmp_path}/y.db")
    assert told(one) == told(other)
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())


@pytest.mark.parametrize("killed_in", [1, 2, 4])
def test_killed_in_a_trial_it_ends_with_the_same_trials(problem, tmp_path, monkeypatch, killed_in):
    expected = told(ran(problem, f"sqlite:///{tmp_path}/whole.db"))
    storage, calls, score = f"sqlite:///{tmp_path}/x.db", [], study.score

    def dying(*args):
        calls.append(None)
        if len(calls) == killed_in:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)
        return score(*args)

    with monkeypatch.context() as patch:
        patch.setattr(study, "score", dying)
        assert ending(forked(lambda: ran(problem, storage))) == -9
    assert len(told(optuna.load_study(study_name=None, storage=storage))) == killed_in - 1
    found = told(ran(problem, storage))
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_processes_that_begin_at_once_share_a_new_storage(tmp_path):
    begin = time.monotonic() + 0.5

    def opening():
        time.sleep(max(0, begin - time.monotonic()))
        open_study("a", f"sqlite:///{tmp_path}/x.db")

    assert [ending(child) for child in [forked(opening) for _ in range(6)]] == [0] * 6


def test_a_storage_that_cannot_be_used_is_one_line(monkeypatch):
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    with pytest.raises(UserError, match="--storage sqlite:////nowhere/x.db cannot be used: .*unable to open"):
        open_study("a", "sqlite:////nowhere/x.db")


def test_what_diverges_or_does_not_fit_together_is_a_trial_and_scores_nothing(problem, tmp_path, monkeypatch):
    def diverging(*args, **kwargs):
        raise UserError("the loss is not finite at iteration 2")

    monkeypatch.setattr(study, "train", diverging)
    assert [value for _, value in told(ran(problem, f"sqlite:///{tmp_path}/x.db"))] == [0.0] * 4


def test_the_preset_is_what_hydra_composes_and_says_the_constants(problem, tmp_path):
    found = ran(problem, f"sqlite:///{tmp_path}/x.db")
    best = {"cbml_log": found.best_params}
    text = write_preset([problem.cell], best, "4 trials", "Tuned: 4 trials.")
    content = yaml.safe_load(text)
    assert "override /loss: [cbml_log]" in text and text.startswith("# @package _global_\n# Tuned: 4 trials.\n")
    assert content["loss"]["cbml_log"]["margin"] == pytest.approx(found.best_params["margin"], rel=1e-3)
    assert content["loss"]["cbml_log"]["tuned"] == "4 trials"
    table = trials_table(problem, found)
    assert table.columns.tolist()[:5] == ["loss", "trial", "score", "fold_1", "fold_2"] and len(table) == 4


def test_a_best_value_at_an_end_of_its_range_is_told(problem):
    assert near_an_end(problem, {"recipe.lr": 1.02e-4, "margin": 0.15}) == ["recipe.lr"]
    assert near_an_end(problem, {"recipe.lr": 1e-3, "margin": 0.299}) == ["margin"]
    assert near_an_end(problem, {"recipe.lr": 1e-2, "margin": 0.1}) == []


def test_a_study_is_one_run_of_mlflow_with_its_trials_inside_and_logged_once(problem, tmp_path, workspace):
    found = ran(problem, f"sqlite:///{tmp_path}/x.db")
    table = trials_table(problem, found)
    for _ in range(2):
        log_study(workspace, problem.cell, found.study_name, BUDGET.told, table)
    client = Store(workspace).client
    experiment = client.get_experiment_by_name("tuning").experiment_id
    runs = client.search_runs([experiment])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.data.metrics["score"] == table.score.max() and parent.data.tags["budget"] == BUDGET.told
    assert {run.data.tags["mlflow.parentRunId"] for run in runs if run is not parent} == {parent.info.run_id}
    scores = {int(run.data.tags["trial"]): run.data.metrics for run in runs if run is not parent}
    assert [scores[i]["score"] for i in range(1, 5)] == table.score.tolist()
    assert [scores[i]["fold_2"] for i in range(1, 5)] == table.fold_2.tolist()
    assert {run.data.params["margin"] for run in runs if run is not parent} == set(map(str, table.margin))
