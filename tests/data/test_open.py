"""A dataset, opened once: what a cell needs of it is read when it is asked for, and no file twice."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import VALIDATING, run

import cbml.data.open as opening
from cbml import workspace as workspaces
from cbml.data import packing
from cbml.errors import UserError
from cbml.stages.evaluate import evaluate_cell
from cbml.stages.inputs import open_data


@pytest.fixture
def read(monkeypatch):
    """How often each file was read, by name; the pack of decoded images counts as one."""
    counts = Counter()

    def count(owner, function):
        original = getattr(owner, function)

        def counted(first, *args, **kwargs):
            counts["images" if function == "pack_images" else first.name] += 1
            return original(first, *args, **kwargs)

        monkeypatch.setattr(owner, function, counted)

    count(opening, "read_list")
    count(opening, "read_json")
    count(opening, "pack_images")
    count(workspaces, "load_params")
    return counts


ONCE = {"train.txt": 1, "test.txt": 1, "summary.json": 1, "images": 1, "params.yaml": 1}


def test_training_and_evaluation_read_each_file_once(workspace, read):
    read["params.yaml"] -= 1  # `run` reads it, too, for the cell
    folder = run(workspace, recipe=VALIDATING)
    assert read == ONCE
    read.clear()
    evaluate_cell(folder, workspace)
    assert read == ONCE


def test_the_images_of_a_part_are_those_of_the_list(workspace):
    (cell,) = workspace.cells("glyphs")
    data = open_data(workspace, cell)
    rows = np.array([30, 2, 7])
    every, part = data.images(data.test), data.images(data.test.subset(rows))
    boxes = torch.tensor([[0, 0, 24, 24]] * 3)
    assert torch.equal(part.crops(torch.arange(3), boxes, 20), every.crops(torch.from_numpy(rows), boxes, 20))
    assert part.labels.tolist() == data.test.labels[rows].tolist()
    assert len(data.images(data.train)) == 36 and not set(data.train.paths) & set(data.test.paths)


def test_a_label_that_was_changed_in_place_is_noticed_where_images_are_decoded(workspace, tiny_dataset, monkeypatch):
    Path("lists").unlink()
    shutil.copytree(tiny_dataset / "lists", "lists")
    (cell,) = workspace.cells("glyphs")
    assert len(open_data(workspace, cell).every) == 72
    file = workspace.lists("glyphs") / "train.txt"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0].replace(",0", ",1"), *lines[1:]]))
    data = open_data(workspace, cell)
    with pytest.raises(UserError, match=r"the lists in .*glyphs have changed.*pipeline\.clean --damaged`, `dvc repro"):
        data.images(data.train)
    file.write_text("".join(lines))
    monkeypatch.setattr(packing, "inspect", None)  # what is decoded is found as before
    assert len(open_data(workspace, cell).every) == 72


@pytest.mark.parametrize("content", [b"", None, b"flipped"])
@pytest.mark.parametrize("room", [1, 0])
def test_damaged_hashes_of_decoded_images_are_found_again_in_their_files(workspace, monkeypatch, content, room):
    monkeypatch.setenv("CBML_PACKED_GB", str(room))
    shutil.rmtree(workspace.cache, ignore_errors=True)
    (cell,) = workspace.cells("glyphs")
    labels = open_data(workspace, cell).every.labels
    (file,) = workspace.cache.glob("*/digests.npy")
    whole = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if content else content)
    assert torch.equal(open_data(workspace, cell).every.labels, labels)
    assert file.read_bytes() == whole
    monkeypatch.setattr(packing, "inspect", None)
    assert torch.equal(open_data(workspace, cell).every.labels, labels)


def test_nothing_is_read_before_it_is_asked_for(workspace, read):
    (cell,) = workspace.cells("glyphs")
    read.clear()
    data = open_data(workspace, cell)
    assert read == {"params.yaml": 1}
    assert len(data.test.paths) == 36 and data.scoring.queries is None
    assert read == {"params.yaml": 1, "test.txt": 1}
    absent = open_data(workspace, replace(cell, dataset="absent"))
    with pytest.raises(UserError, match=r"absent/summary\.json: no such file"):
        _ = absent.fingerprint
    with pytest.raises(UserError, match="lists/absent/.*does not exist; build_lists writes it"):
        _ = absent.train
