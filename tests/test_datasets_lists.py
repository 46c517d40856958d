import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from cbml.datasets.lists import ImageList, build_lists, check_disjoint, hold_out, read_list
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


def test_the_last_training_classes_are_held_out(dataset, tmp_path):
    build_lists(dataset, tmp_path / "lists")
    train = read_list(tmp_path / "lists/train.txt", dataset)
    rest, held_out = hold_out(train, 0.5)
    assert rest.paths + held_out.paths == train.paths
    assert (rest.labels.tolist(), held_out.labels.tolist()) == ([0, 0, 1, 1, 1], [3, 6, 6])


@pytest.mark.parametrize("share", [0.1, 0.9, -0.5])
def test_two_classes_are_needed_on_either_side(share):
    images = ImageList(["x"] * 4, np.arange(4))
    assert f"validation_classes={share} holds out" in error_of(hold_out, images, share)


def test_fingerprint_covers_lists_paths_labels_and_content(dataset, tmp_path):
    digest = hashlib.sha256()
    first = build_lists(dataset, tmp_path / "a")["fingerprint"]
    for name in ("train", "test"):
        for line in (tmp_path / f"a/{name}.txt").read_text().splitlines():
            content = (dataset / line.rpartition(",")[0]).read_bytes()
            digest.update(f"{name},{line},{hashlib.sha256(content).hexdigest()}\n".encode())
    assert first == digest.hexdigest()[:16]
    Image.new("RGB", (4, 4), (0, 9, 0)).save(dataset / "images/001.Bird/0.png")
    second = build_lists(dataset, tmp_path / "a")["fingerprint"]
    labels = dataset / "image_class_labels.txt"
    labels.write_text(labels.read_text().replace("2 1\n", "2 2\n"))
    assert len({first, second, build_lists(dataset, tmp_path / "a")["fingerprint"]}) == 3


def test_an_undecodable_image_is_named_and_nothing_is_written(dataset, tmp_path):
    for content in (b"no image", (dataset / "images/009.Bird/0.png").read_bytes()[:-30]):
        (dataset / "images/009.Bird/0.png").write_bytes(content)
        assert "images/009.Bird/0.png: not an image that Pillow can read" in error_of(
            build_lists, dataset, tmp_path / "lists"
        )
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
        (
            "images.txt",
            "2 001.Bird/0.png",
            "2 ../images/001.Bird/0.png",
            "images.txt: image 2 is '../images/001.Bird/0.png'",
        ),
        ("images.txt", "2 001.Bird/0.png", "2 {dataset}/images/001.Bird/0.png", "images.txt: image 2 is '/"),
        (
            "images.txt",
            "2 001.Bird/0.png",
            f"2 001.Bird/{'0' * 256}.png",
            ".png is missing; images.txt lists it as image 2",
        ),
        ("images.txt", "2 001.Bird/0.png", "2 001.Bird/0\0.png", "images.txt cannot be read (NUL byte)"),
        (
            "images.txt",
            "2 001.Bird/0.png",
            "2 001.Bird/\udcff.png",
            "images.txt cannot be read ('utf-8' codec can't decode",
        ),
        ("images.txt", "2 001", f"{'2' * 5000} 001", f"images.txt, line 2: '{'2' * 100}'; expected"),
        ("image_class_labels.txt", "2 1", f"2 {'1' * 5000}", f"image 2 has class id '{'1' * 100}', which"),
        ("classes.txt", "1 001.Bird", "1 001.Bird\udcff", "classes.txt cannot be read"),
        ("classes.txt", "13 013.Bird", "13 013.Bird\n14 014.Wren", "class 14 (014.Wren) has no images"),
    ],
)
def test_a_broken_table_is_named(dataset, tmp_path, file, line, replacement, message):
    text = (dataset / file).read_text()
    assert line in text
    replacement = replacement.replace("{dataset}", str(dataset))
    (dataset / file).write_text(text.replace(line, replacement, 1), errors="surrogateescape")
    assert message in error_of(build_lists, dataset, tmp_path / "lists")


@pytest.mark.parametrize("name", ["classes.txt", "images"])
def test_a_folder_for_a_file_or_a_file_for_a_folder(dataset, tmp_path, name):
    (dataset / name).rename(tmp_path / name)
    (dataset / name).touch() if name == "images" else (dataset / name).mkdir()
    assert f"{name} not found; expected images (a folder), images.txt" in error_of(build_lists, dataset, tmp_path / "l")


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
        ("images/../images/001.Bird/0.png,0\n", "line 1: 'images/../images/001.Bird/0.png,0'; expected"),
        (f"images/001.Bird/{'0' * 256}.png,0\n", ".png does not exist"),
        (f"images/001.Bird/0.png,{'0' * 5000}\n", "line 1: 'images/001.Bird/0.png,000"),
        ("images/001.Bird/\0.png,0\n", "train.txt cannot be read (NUL byte)"),
        ("images/001.Bird/\udcff.png,0\n", "train.txt cannot be read ('utf-8' codec"),
        ("", "is empty"),
    ],
)
def test_a_broken_list_is_named(dataset, tmp_path, text, message):
    (tmp_path / "train.txt").write_text(text, errors="surrogateescape")
    error = error_of(read_list, tmp_path / "train.txt", dataset)
    assert message in error
    assert str(tmp_path / "train.txt") in error or "does not exist" in error


def test_missing_list(tmp_path):
    assert "nothing.txt does not exist" in error_of(read_list, tmp_path / "nothing.txt", tmp_path)


def test_overlapping_classes_are_named():
    train, test = (ImageList(["x"] * 3, np.array(labels)) for labels in ([0, 1, 2], [2, 1, 5]))
    error = error_of(check_disjoint, train, test)
    assert "2 classes are in both the training and the test list, e.g. labels 1, 2;" in error
