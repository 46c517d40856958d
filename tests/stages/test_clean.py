"""What was damaged in place in DVC's cache is removed from it, and made again."""

import os

import pytest
import yaml
from dvc.repo import Repo

from cbml.errors import UserError
from cbml.stages.clean import remove_damaged
from cbml.workspace import Workspace

RUN = {"runs/cell/final.pt": b"weights", "runs/cell/run.json": b"{}", "table.csv": b"1,2\n"}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout whose one stage writes the files of `RUN`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    repo = Repo.init(no_scm=True)
    with repo.config.edit("repo") as config:
        config["cache"] = {"type": "hardlink,copy"}  # as this repository's
    words = [f"printf '{content.decode().strip()}\\n' > {file}" for file, content in RUN.items()]
    command = " && ".join(["mkdir -p runs/cell", "echo x >> times", *words])
    stage = {"cmd": command, "deps": ["list.txt"], "outs": ["runs/cell", "table.csv"]}
    (tmp_path / "list.txt").write_text("a.png,0\n")
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"train": stage}}))
    repro()
    return tmp_path


def repro():
    with Repo() as repo:
        repo.reproduce()


def content(repository):
    return {file: (repository / file).read_bytes() for file in RUN}


@pytest.mark.parametrize("file", RUN)
@pytest.mark.parametrize("noticed", [True, False])
def test_what_was_damaged_in_place_is_removed_and_made_again(repository, capsys, file, noticed):
    whole, path = content(repository), repository / file
    before = path.stat()
    os.chmod(path, 0o644)
    path.write_bytes(b"damaged")
    os.chmod(path, before.st_mode)
    if not noticed:  # the disk's own doing
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    repro()
    assert path.read_bytes() == b"damaged"  # DVC trusts its cache: without the following it stays so
    (removed,) = remove_damaged(Workspace(repository, repository))
    assert f"{removed}: damaged, removed" in capsys.readouterr().err
    repro()
    assert content(repository) == whole and (repository / "times").read_text() == "x\n" * 2
    assert path.stat().st_nlink == 2
    assert not remove_damaged(Workspace(repository, repository))


def test_what_is_whole_stays(repository):
    cache = {file: file.read_bytes() for file in (repository / ".dvc/cache").rglob("*") if file.is_file()}
    assert not remove_damaged(Workspace(repository, repository))
    assert {file: file.read_bytes() for file in cache} == cache and len(cache) >= 4
    repro()
    assert (repository / "times").read_text() == "x\n"


def test_without_a_repository_of_dvc_it_is_one_line(tmp_path):
    with pytest.raises(UserError, match="^DVC: you are not inside of a DVC repository"):
        remove_damaged(Workspace(tmp_path, tmp_path))


def test_while_dvc_works_it_is_one_line(repository):
    with Repo() as repo, repo.lock, pytest.raises(UserError, match="^DVC: Unable to acquire lock"):
        remove_damaged(Workspace(repository, repository))
