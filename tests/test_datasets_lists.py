import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from cbml.datasets.lists import ImageList, build_lists, check_disjoint, read_list
from cbml.errors import UserError

COUNTS = {1: 2, 2: 3, 4: 1, 7: 2, 8: 2, 9: 1, 12: 2, 13: 2}  # class id: images; ids need not be contiguous


@pytest.fixture
def dataset(tmp_path):
    """Eight classes in CUB's layout; the image ids do not follow the alphabet."""
    root = tmp_path / "data"
    pairs = [(c, f"{c:03}.Bird/{k}.png") for c, count in COUNTS.items() for k in reversed(range(count))]
    for c, path in pairs:
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (c, 0, 0)).save(root / "images" / path)
    (root / "images.txt").write_text("".join(f"{n} {path}\n" for n, (_, path) in enumerate(pairs, 1)))
    (root / "image_class_labels.txt").write_text("".join(f"{n} {c}\n" for n, (c, _) in enumerate(pairs, 1)))
    (root / "classes.txt").write_text("".join(f"{c} {c:03}.Bird\n" for c in COUNTS))
    (root / "train_test_split.txt").write_text("".join(f"{n} 0\n" for n, _ in enumerate(pairs, 1)))
    return root


def error_of(function, *args, **kwargs):
    with pytest.raises(UserError) as info:
        function(*args, **kwargs)
    assert "\n" not in str(info.value)
    return str(info.value)


def test_first_half_of_the_classes_trains_in_image_order(dataset, tmp_path):
    out = tmp_path / "lists"
    summary = build_lists(dataset, out)
    assert (out / "train.txt").read_text().splitlines() == [
        "images/001.Bird/1.png,0",
        "images/001.Bird/0.png,0",
        "images/002.Bird/2.png,1",
        "images/002.Bird/1.png,1",
        "images/002.Bird/0.png,1",
        "images/004.Bird/0.png,3",
        "images/007.Bird/1.png,6",
        "images/007.Bird/0.png,6",
    ]
    assert summary["train"] == {"images": 8, "classes": 4}
    assert summary["test"] == {"images": 7, "classes": 4}
    assert summary == json.loads((out / "summary.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == ["summary.json", "test.txt", "train.txt"]
    train, test = (read_list(out / f"{name}.txt", dataset) for name in ("train", "test"))
    assert train.labels.dtype == np.int64
    assert train.num_classes == 4
    assert sorted(set(test.labels.tolist())) == [7, 8, 11, 12]
    check_disjoint(train, test)


def test_images_are_sorted_by_number_and_not_by_text(dataset, tmp_path):
    lines = (dataset / "images.txt").read_text().splitlines(keepends=True)
    (dataset / "images.txt").write_text("".join(sorted(lines)))  # 1, 10, 11, …, 2
    build_lists(dataset, tmp_path / "lists")
    assert read_list(tmp_path / "lists/train.txt", dataset).paths[1] == "images/001.Bird/0.png"


def test_validation_holds_out_the_last_training_classes(dataset, tmp_path):
    summary = build_lists(dataset, tmp_path / "lists", validation_classes=0.5)
    read = {name: (tmp_path / f"lists/{name}.txt").read_text() for name in summary if name != "fingerprint"}
    assert read["train_without_validation"] + read["validation"] == read["train"]
    assert [line.rpartition(",")[2] for line in read["validation"].splitlines()] == ["3", "6", "6"]


@pytest.mark.parametrize("share", [0.1, 0.9, -0.5])
def test_validation_needs_two_classes_on_either_side(dataset, tmp_path, share):
    assert "2 must be held out" in error_of(build_lists, dataset, tmp_path / "lists", validation_classes=share)


def test_fingerprint_covers_content_path_and_label(dataset, tmp_path):
    digest = hashlib.sha256()
    first = build_lists(dataset, tmp_path / "a")["fingerprint"]
    for name in ("train", "test"):
        for line in (tmp_path / f"a/{name}.txt").read_text().splitlines():
            content = (dataset / line.rpartition(",")[0]).read_bytes()
            digest.update(f"{line},{hashlib.sha256(content).hexdigest()}\n".encode())
    assert first == digest.hexdigest()[:16]
    Image.new("RGB", (4, 4), (0, 9, 0)).save(dataset / "images/001.Bird/0.png")
    assert build_lists(dataset, tmp_path / "a")["fingerprint"] != first


def test_an_undecodable_image_is_named_and_nothing_is_written(dataset, tmp_path):
    for content in (b"no image", (dataset / "images/009.Bird/0.png").read_bytes()[:-30]):
        (dataset / "images/009.Bird/0.png").write_bytes(content)
        assert "images/009.Bird/0.png cannot be decoded" in error_of(build_lists, dataset, tmp_path / "lists")
    assert not (tmp_path / "lists").exists()


@pytest.mark.parametrize(
    ("file", "line", "replacement", "message"),
    [
        ("images.txt", "1 001.Bird/1.png", "1", "images.txt, line 1: '1'; expected"),
        ("images.txt", "1 001.Bird/1.png", "x 001.Bird/1.png", "images.txt, line 1: 'x 001.Bird/1.png'; expected"),
        ("images.txt", "2 001.Bird/0.png", "1 001.Bird/0.png", "images.txt, line 2: id 1 is listed twice"),
        ("images.txt", "2 001.Bird/0.png", "2 001.Bird/9.png", "images/001.Bird/9.png is missing"),
        ("image_class_labels.txt", "2 1", "2 99", "image 2 has class id '99', which classes.txt does not list"),
        ("image_class_labels.txt", "2 1", "2 one", "image 2 has class id 'one', which classes.txt does not list"),
        ("image_class_labels.txt", "2 1\n", "", "image id 2 is in only one of images.txt and image_class_labels.txt"),
        ("classes.txt", "13 013.Bird", "13 013.Bird\n14 014.Wren", "class 14 (014.Wren) has no images"),
    ],
)
def test_a_broken_table_is_named(dataset, tmp_path, file, line, replacement, message):
    text = (dataset / file).read_text()
    assert line in text
    (dataset / file).write_text(text.replace(line, replacement, 1))
    assert message in error_of(build_lists, dataset, tmp_path / "lists")


def test_missing_image_file(dataset, tmp_path):
    (dataset / "images/004.Bird/0.png").unlink()
    assert "images/004.Bird/0.png is missing; images.txt lists it as image 6" in error_of(
        build_lists, dataset, tmp_path / "lists"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images/001.Bird/0.png,0\nimages/001.Bird/1.png\n", "line 2: 'images/001.Bird/1.png'; expected"),
        ("images/001.Bird/0.png,-1\n", "line 1: 'images/001.Bird/0.png,-1'; expected"),
        ("images/001.Bird/0.png,0\n\n", "line 2: ''; expected"),
        ("images/001.Bird/7.png,0\n", "images/001.Bird/7.png does not exist"),
        ("", "is empty"),
    ],
)
def test_a_broken_list_is_named(dataset, tmp_path, text, message):
    (tmp_path / "train.txt").write_text(text)
    error = error_of(read_list, tmp_path / "train.txt", dataset)
    assert message in error
    assert str(tmp_path / "train.txt") in error or "does not exist" in error


def test_missing_list(tmp_path):
    assert "nothing.txt does not exist" in error_of(read_list, tmp_path / "nothing.txt", tmp_path)


def test_overlapping_classes_are_named():
    train, test = (ImageList(["x"] * 3, np.array(labels)) for labels in ([0, 1, 2], [2, 1, 5]))
    error = error_of(check_disjoint, train, test)
    assert "2 classes are in both the training and the test list, e.g. labels 1, 2;" in error
