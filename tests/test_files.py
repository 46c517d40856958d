"""Files are complete or absent, damage is one line, and so is what the machine has too little of."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import TINY_RECIPE, environment, run, tiny_params
from PIL import Image

from cbml.errors import UserError, run_main, shortage
from cbml.files import atomic_write, read_csv, read_json, read_tensors, share, write_tensors, write_text
from cbml.stages.evaluate import evaluate_cell
from cbml.workspace import Workspace


def test_a_folder_takes_the_place_of_another_at_once(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with atomic_write(target) as folder:
            folder.mkdir()
            (folder / "file").write_text(content)
            # Until the block ends there is the old one, whole.
            assert not target.exists() or (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_block_that_fails_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "file", "old")
    with pytest.raises(ValueError), atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise ValueError
    assert (tmp_path / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_two_processes_may_write_the_same_folder(tmp_path):
    code = f"""
from pathlib import Path
from cbml.files import atomic_write, read_tensors, write_tensors, write_text
for number in range(200):
    with atomic_write(Path({str(tmp_path / "folder")!r})) as folder:
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(str(number))
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment(), stderr=subprocess.PIPE) for _ in range(2)
    ]
    assert [process.communicate()[1] for process in processes] == [b"", b""]
    contents = {file.read_text() for file in (tmp_path / "folder").iterdir()}
    assert contents == {"199"} and list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    with atomic_write(tmp_path / "file") as temporary:
        temporary.touch()
        mine = temporary.parent
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = mine.with_name(mine.name.replace(str(os.getpid()), str(dead.pid)))
    alive = mine.with_name(mine.name.replace(str(os.getpid()), "1"))
    left.mkdir(), alive.mkdir()
    write_text(tmp_path / "file", "x")
    assert not left.exists() and alive.exists()


def test_a_copy_shares_its_files_space_where_the_disk_can(tmp_path, monkeypatch):
    file, copy = tmp_path / "file", tmp_path / "elsewhere" / "copy"
    copy.parent.mkdir()
    for each in (file, copy):
        each.write_text("weights")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: os.listdir("/nowhere"))  # as between two disks: an OSError
        share(file, copy)
    assert copy.read_text() == "weights" and not copy.samefile(file)
    share(file, copy)
    assert copy.samefile(file)
    file.unlink()
    assert copy.read_text() == "weights" and [*copy.parent.iterdir()] == [copy]


def test_tensors_whose_bytes_have_changed_are_not_read(tmp_path):
    file = tmp_path / "a.pt"
    write_tensors(file, {"a": torch.arange(1000.0)})
    assert read_tensors(file, "train")["a"][999] == 999
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    torch.load(file, weights_only=True)  # does not notice
    with pytest.raises(UserError, match=r"a\.pt: damaged .*run the stage train again"):
        read_tensors(file, "train")


def ended(error):
    """The line that a script ends with."""

    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_main(main)
    return exit.value.code


def test_what_the_machine_has_too_little_of_is_one_line():
    full = OSError(errno.ENOSPC, "No space left on device", "x.pt")
    line = "error: the disk is full (x.pt): make room, and the same command continues where it stopped"
    assert ended(full) == line
    wrapped = RuntimeError("unexpected pos 704 vs 598")
    wrapped.__context__ = full
    assert "the disk is full" in ended(wrapped)
    assert "too little memory" in ended(MemoryError())
    assert "too little memory (CUDA out of memory)" in ended(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as allocation:
        torch.empty(2**60, dtype=torch.uint8)
    assert "too little memory" in ended(allocation.value) and "\n" not in ended(allocation.value)
    assert ended(NotADirectoryError(errno.ENOTDIR, "Not a directory", "data/x")).startswith("error: [Errno 20]")
    assert shortage(ValueError("x")) is None


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
    ids=str,
)
def test_little_memory_in_other_words_is_one_line(error):
    assert ended(error).startswith("error: too little memory (") and str(error) in ended(error)


@pytest.mark.parametrize("gigabytes", [0.1, 0.5, 1, 2])
def test_little_memory_for_the_packages_themselves_is_one_line(workspace, gigabytes):
    limit = int(gigabytes * 2**20)
    command = f"ulimit -v {limit}; exec {sys.executable} -m pipeline.build_lists glyphs"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 0 or (len(lines) == 1 and "too little memory" in lines[0]), done.stderr


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ESTALE])
@pytest.mark.parametrize("read", [read_json, read_csv, read_tensors])
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, read, number):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    file = tmp_path / "final.pt"
    file.write_text("{}")
    for place in ("builtins.open", "io.open", "pathlib.Path.open", "pathlib.Path.read_text"):
        monkeypatch.setattr(place, fail)
    monkeypatch.setattr("pandas.read_csv", fail)
    with pytest.raises(UserError, match=rf"final\.pt: cannot be read \({os.strerror(number)}\); nothing says"):
        read(file, "train")


@pytest.mark.parametrize("value", ["4q.0", "", "'", "0x1"])
def test_text_where_numbers_belong_is_damage(tmp_path, value):
    file = tmp_path / "recall_at_k.csv"
    file.write_text(f"name,k,recall\na,1,{value}\nb,2,50.0\n")
    if not value:  # none
        assert read_csv(file, "evaluate", ("k",), dtype={"name": str}).recall.isna().tolist() == [True, False]
        return
    with pytest.raises(UserError, match=r"damaged \(ValueError: not only numbers in the column recall\); run"):
        read_csv(file, "evaluate", ("k",), dtype={"name": str})


def test_the_cure_of_what_was_damaged_in_place_lasts(tmp_path):
    file = tmp_path / "final.pt"
    file.write_bytes(b"damaged")
    for read in (read_json, read_tensors):
        with pytest.raises(UserError, match=r"; run the stage train again, which writes it$"):
            read(file, "train")
    (tmp_path / "cache").hardlink_to(file)
    for read in (read_json, read_tensors):
        with pytest.raises(UserError, match=r"same bytes: `python -m pipeline\.clean --damaged`, then `dvc repro`$"):
            read(file, "train")


WITHOUT_LIBRARY = """
import resource, sys
from pathlib import Path
import PIL.Image, torch
from cbml.errors import prepare_script
prepare_script()
used = 1024 * int(Path("/proc/self/status").read_text().partition("VmSize:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
import torchvision
"""


@pytest.mark.parametrize("room", ["1", "4"])
def test_too_little_memory_for_a_library_that_torchvision_does_not_miss_is_one_line(room):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARY, room], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.startswith("error: too little memory ("), done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_where_a_file_belongs_is_to_be_moved_away(tmp_path):
    for read in (read_json, read_csv, read_tensors):
        with pytest.raises(UserError, match="a folder, expected a file; move it away, the stage train writes"):
            read(tmp_path, "train")
    assert "move it away" in ended(IsADirectoryError(errno.EISDIR, "Is a directory", "final.pt"))


ANY_NAME = """
import os, sys
from cbml.errors import run_main
run_main(lambda: print("0.5 ± 0.1 …", os.fsdecode(b"\\xff.png")))
"""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", rb"0.5 \xb1 0.1 \u2026 \udcff.png"), ("latin-1", b"0.5 \xb1 0.1 \\u2026 \\udcff.png")],
)
def test_what_an_output_cannot_express_ends_nothing(encoding, shown):
    done = subprocess.run(
        [sys.executable, "-c", ANY_NAME], env=environment() | {"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, shown), done.stderr


def test_names_of_files_are_utf_8_whatever_the_locale_says(tmp_path):
    """A class `grün` is not called `grÃ¼n`, and a table's `grün` is found."""
    made = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / "en_US")]
    if not shutil.which("localedef") or subprocess.run(made, capture_output=True).returncode:
        pytest.skip("no locale but of UTF-8 can be made here")
    for number, name in enumerate(("blau", "grün", "rot", "weiß")):
        for k in range(2):
            file = tmp_path / "pictures" / name / f"é{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 8), (40 * number, 70 * k, 5)).save(file)
    (tmp_path / "params.yaml").write_text(
        yaml.safe_dump(
            tiny_params(dataset={"mine": {"type": "folder", "path": "pictures"}}, recipe=TINY_RECIPE | {"instances": 4})
        )
    )
    latin = environment() | {"LOCPATH": str(tmp_path), "LC_ALL": "en_US"}
    told = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.getfilesystemencoding())"], env=latin, capture_output=True
    )
    assert told.stdout.strip() == b"iso8859-1"
    for stage in ("download", "build_lists"):
        command = [sys.executable, "-m", f"pipeline.{stage}", "mine"]
        done = subprocess.run(command, env=latin, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
    classes = (tmp_path / "lists/mine/classes.txt").read_text(encoding="utf-8")
    assert classes == "0 blau\n1 grün\n2 rot\n3 weiß\n"


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


def test_a_disk_without_room_for_the_result_ends_in_one_line(tmp_path):
    code = """
import sys
from pathlib import Path
import torch
from cbml import files
from cbml.errors import run_main
files.atomic_write = lambda path: __import__("contextlib").nullcontext(Path("/dev/full"))
run_main(lambda: files.write_tensors(Path("x.pt"), {"a": torch.zeros(10**6)}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def trained(tiny_dataset, tmp_path_factory):
    """A workspace with a trained cell, for tests that leave both as they were."""
    with contextlib.chdir(tmp_path_factory.mktemp("trained")):
        for name in ("data", "lists"):
            shutil.copytree(tiny_dataset / name, name)
        folder = run(Workspace.here()).resolve()
    return folder.parents[2], folder


@pytest.mark.parametrize("damage", ["absent", "empty", "garbage", "truncated"])
@pytest.mark.parametrize(
    "file, stage",
    [
        ("final.pt", "train"),
        ("cell.yaml", "train"),
        ("run.json", "train"),
        ("validations.csv", "train"),
        ("losses.csv", "train"),
        ("lists/summary.json", "build_lists"),
        ("lists/test.txt", "build_lists"),
    ],
)
def test_a_damaged_input_of_evaluate_is_one_line(trained, file, stage, damage):
    root, folder = trained
    path = root / "lists/glyphs" / Path(file).name if file.startswith("lists/") else folder / file
    content = path.read_bytes()
    path.unlink()
    if damage != "absent":
        path.write_bytes({"empty": b"", "garbage": b"\xff\x00{[", "truncated": content[: len(content) // 3]}[damage])
    try:
        with pytest.raises(UserError) as error:
            evaluate_cell(folder, Workspace(root, root))
    finally:
        path.write_bytes(content)
    assert "\n" not in str(error.value) and Path(file).name in str(error.value)
