"""The store: that it goes along with its checkout, is found from everywhere, and says what it does not take."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlflow
import pandas as pd
import pytest
import torch
from finished_cells import cells, finish
from helpers import ROOT, ended, ending, environment, forked

from cbml import network
from cbml.errors import UserError
from cbml.stages.embed import load_model
from cbml.stages.hand_over import hand_over
from cbml.stages.import_cells import import_cells
from cbml.tracking import ui
from cbml.tracking.run import open_cell, open_tables, open_trained
from cbml.tracking.store import Store, absolute, public
from cbml.workspace import Workspace

(CELL,) = cells()
KEY = CELL.key("0123", None)
WEIGHTS = "0123abcd"


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """The working directory is none of the checkouts."""
    (tmp_path / "nowhere").mkdir()
    monkeypatch.chdir(tmp_path / "nowhere")


def checkout(folder):
    """A workspace, as a new process sees it: MLflow notes the store in use in the environment."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return Workspace(folder, folder)


def finished_cell(workspace, cell=CELL, *, weights=WEIGHTS, **facts):
    """What training and evaluation of a cell leave; the evaluation."""
    one = finish(workspace, cell, final_weights_sha256=weights, **facts)
    folder = workspace.run(cell)
    folder.mkdir(parents=True)
    (folder / "cell.yaml").write_text(cell.to_yaml())
    model, _ = network.build(cell, num_classes=6, root=workspace.root)
    torch.save(model.state_dict(), folder / "final.pt")
    return one


def handed_over(workspace, cell=CELL, *, model=True, **facts):
    """Whether the store has taken everything of such a cell."""
    one = finished_cell(workspace, cell, **facts)
    return hand_over(workspace, cell, one.folder, workspace.run(cell) if model else Path("none"))


def runs(store, experiment="glyphs"):
    return store.client.search_runs([store.client.get_experiment_by_name(experiment).experiment_id])


def dump(database):
    with closing(sqlite3.connect(database)) as connection:
        return "\n".join(connection.iterdump())


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


# It goes along


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A checkout with a cell and its model in its store."""
    folder = tmp_path_factory.mktemp("finished")
    assert handed_over(checkout(folder))
    return folder


def copied(finished, folder):
    """A checkout at `folder` that was there from the beginning: no path leads to another."""
    shutil.copytree(finished, folder)
    assert Store(checkout(folder)).finished("glyphs")
    return folder


def test_the_store_goes_along_when_its_checkout_is_moved(finished, tmp_path):
    old = copied(finished, tmp_path / "a")
    new = old.rename(tmp_path / "b")
    found = Store(checkout(new)).finished("glyphs")
    assert found.keys() == {KEY} and found[KEY].is_relative_to(new) and (found[KEY] / "metrics.json").is_file()
    assert load_model(KEY, checkout(new)).cell == CELL
    assert handed_over(checkout(new), replace(CELL, seed=1), model=False)
    assert len(Store(checkout(new)).finished("glyphs")) == 2
    assert not old.exists() and str(old) not in dump(new / "mlflow.db")


def test_nothing_that_outlives_a_run_names_a_path_of_the_machine(tmp_path):
    folder = tmp_path / "a"
    assert handed_over(checkout(folder))
    text = dump(folder / "mlflow.db")
    places = text.count(f"{folder.as_uri()}/mlruns")
    assert places and text.count(str(tmp_path)) == places  # these are corrected in a checkout that was moved
    started = Path(sys.argv[0]).parent
    assert str(ROOT) not in text and not (started.is_absolute() and str(started) in text)
    for file in (folder / "mlruns").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert not any(str(path).encode() in content for path in (tmp_path, ROOT)), file


def test_what_is_cleaned_in_a_copy_stays_in_the_original(finished, tmp_path):
    original, copy = copied(finished, tmp_path / "a"), tmp_path / "c"
    shutil.copytree(original, copy)
    before = files(original)
    store = Store(checkout(copy))
    (run,) = runs(store)
    store.client.delete_run(run.info.run_id)
    store.clean()
    assert files(original) == before
    assert not [file for file in files(copy / "mlruns") if "final.pt" in file or "metrics.json" in file]
    assert Store(checkout(original)).finished("glyphs").keys() == {KEY}


def test_files_that_stayed_behind_are_one_line_with_the_command_that_brings_them(finished, tmp_path):
    original, copy = copied(finished, tmp_path / "a b"), tmp_path / "c"
    copy.mkdir()
    shutil.copy(original / "mlflow.db", copy)
    with pytest.raises(UserError, match="files were left in .*; to bring them along: cp -r") as refusal:
        Store(checkout(copy)).finished("glyphs")
    (copy / "mlruns").mkdir()
    subprocess.run(str(refusal.value).partition("along: ")[2], shell=True, check=True)
    assert Store(checkout(copy)).finished("glyphs").keys() == {KEY}
    shutil.rmtree(copy / "mlruns")
    original.rename(tmp_path / "gone")
    sqlite3.connect(copy / "mlflow.db").close()
    with pytest.raises(UserError, match="no such folder"):
        Store(checkout(copy)).finished("glyphs")


def test_clean_touches_nothing_outside_its_checkout(finished, tmp_path):
    folder, elsewhere = copied(finished, tmp_path / "a"), tmp_path / "elsewhere"
    store = Store(checkout(folder))
    experiment = store.client.create_experiment("mine", artifact_location=elsewhere.as_uri())
    run = store.client.create_run(experiment)
    store.client.log_text(run.info.run_id, "text", "file.txt")
    store.client.delete_run(run.info.run_id)
    with pytest.raises(UserError, match=f"outside this checkout .*mlflow gc --backend-store-uri sqlite:///{folder}"):
        store.clean()
    assert len(files(elsewhere)) == 1


@pytest.mark.parametrize("name", ["a%20b", "a?b", "a#b", "a b", "ä"])
def test_a_checkout_may_have_any_name(tmp_path, name):
    folder = tmp_path / "parent" / name
    assert handed_over(checkout(folder))
    assert [each.name for each in (tmp_path / "parent").iterdir()] == [name] and (folder / "mlflow.db").is_file()
    found = Store(checkout(folder)).finished("glyphs")
    assert found[KEY].is_relative_to(folder) and load_model(KEY, checkout(folder)).cell == CELL


# Where it is


@pytest.mark.parametrize(
    "uri, expected",
    [
        ("sqlite:///mlflow.db", "sqlite:////root/mlflow.db"),
        ("sqlite:///x/mine.db?timeout=9", "sqlite:////root/x/mine.db?timeout=9"),
        ("sqlite:////x/mine.db", "sqlite:////x/mine.db"),
        ("mlruns", "/root/mlruns"),
        ("./mlruns", "/root/mlruns"),
        ("/x/mlruns", "/x/mlruns"),
        ("file:mlruns", "file:///root/mlruns"),
        ("file:./my%20runs", "file:///root/my%20runs"),
        ("file:///x/mlruns", "file:///x/mlruns"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://me:secret@host/db", "postgresql://me:secret@host/db"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
    ],
)
def test_relative_means_relative_to_the_repository(uri, expected):
    assert absolute(uri, Path("/root")) == expected


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "sqlite:///mine.db"])
def test_what_an_experiment_in_a_temporary_copy_logs_stays(tmp_path, monkeypatch, uri):
    root, copy = tmp_path / "root", tmp_path / "copy"
    for folder in (root, copy):
        folder.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(copy)
    workspace = Workspace.here()
    assert Store(workspace).own == (uri == "sqlite:///mlflow.db")
    assert handed_over(workspace, model=False)
    shutil.rmtree(copy)
    os.chdir(root)
    assert Store(workspace).finished("glyphs")[KEY].is_relative_to(root)


# An MLflow server


@pytest.fixture(scope="module", params=["", "/prefix"], ids=["at the root", "below a prefix"])
def server(request, tmp_path_factory):
    """A server with default settings: artifacts go through it."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--static-prefix", request.param] if request.param else []
    variables = environment() | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=variables, stderr=log, stdout=log, start_new_session=True)
    uri = f"http://127.0.0.1:{port}{request.param}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=1)
            break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
    yield uri
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_what_a_server_has_is_read_back(server, tmp_path, monkeypatch):
    workspace = checkout(tmp_path / "a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    assert handed_over(workspace)
    other = Workspace(tmp_path / "other", tmp_path / "other")
    for _ in range(2):  # the second time from the copy
        folder = Store(other).finished("glyphs")[KEY]
        assert (folder / "metrics.json").read_text() == (workspace.evaluation(CELL) / "metrics.json").read_text()
    found = load_model(KEY, other)
    assert found.cell == CELL
    expected = torch.load(workspace.run(CELL) / "final.pt")
    assert all(torch.equal(value, expected[name]) for name, value in found.network.state_dict().items())

    # A run that was opened again, by `draw`, has other files.
    page = tmp_path / "page"
    page.mkdir()
    (page / "index.html").write_text("a page")
    record = finished_record(workspace)
    with open_trained(workspace, CELL, record, later="") as run:
        run.log_folder(page)
    assert (Store(other).finished("glyphs")[KEY] / "index.html").read_text() == "a page"
    assert import_cells(workspace.tree, other) == []


def finished_record(workspace):
    from cbml.stages.records import record_of

    return record_of(workspace.evaluation(CELL))


# What it does not take


def test_a_deleted_experiment_is_said_and_how_to_have_it_back(tmp_path, capsys):
    workspace = checkout(tmp_path / "a")
    with open_cell(workspace, CELL, "other-0", "0"):
        pass
    client = Store(workspace).client
    id = client.get_experiment_by_name("glyphs").experiment_id
    client.delete_experiment(id)
    assert not handed_over(workspace, model=False)
    said = capsys.readouterr().err
    cure = f"MLFLOW_TRACKING_URI=sqlite:///{tmp_path}/a/mlflow.db mlflow experiments restore --experiment-id {id}"
    assert cure in said and said.count("was deleted") == 1 and "does not answer" not in said
    with pytest.raises(UserError, match="the experiment glyphs was deleted"):
        import_cells(workspace.tree, workspace)
    client.restore_experiment(id)
    assert import_cells(workspace.tree, workspace) == [KEY]


def test_nothing_is_called_imported_that_the_store_did_not_take(finished, tmp_path, monkeypatch, capsys):
    theirs = checkout(tmp_path / "theirs")
    finished_cell(theirs)
    finished_cell(theirs, replace(CELL, seed=1))
    folder = copied(finished, tmp_path / "a")
    checkout(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///file:{folder}/mlflow.db?mode=ro&uri=true")
    monkeypatch.chdir(folder)
    assert ended("pipeline.import_cells", str(theirs.tree)).startswith("error: 0 cells imported, 1 not")
    done = capsys.readouterr()
    assert "cannot be written" in done.err and ": imported" not in done.err and "does not answer" not in done.err


def test_a_full_quota_is_said_and_the_next_command_completes_the_cell(tmp_path, monkeypatch, capsys):
    workspace = checkout(tmp_path / "a")

    def full(*_, **__):
        raise OSError(122, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.store.artifact.local_artifact_repo.LocalArtifactRepository.log_artifacts", full)
        assert not handed_over(workspace, model=False)
    said = capsys.readouterr().err
    assert "Disk quota exceeded" in said and "did not take all" in said and not Store(workspace).finished("glyphs")
    assert import_cells(workspace.tree, workspace) == [KEY]
    assert len(runs(Store(workspace))) == 1


def test_what_is_refused_blocks_nothing_behind_it(tmp_path, capsys):
    with open_cell(checkout(tmp_path / "a"), CELL, "key-0", "0") as run:
        for _ in range(3):
            run.call("set_tag", "one", "two", "too", "many")
        run.log([{"iteration": 1, "loss": 0.5}])
    (found,) = runs(run.store)
    assert found.info.status == "FINISHED" and found.data.metrics == {"loss": 0.5} and not run.complete
    said = capsys.readouterr().err
    assert said.count("TypeError") == 1 and "does not answer" not in said


def garbage(database):
    database.write_bytes(b"garbage" * 1000)
    return f"file is not a database; move it away (mv {database} {database}.damaged)"


def of_another_release(database):
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0584bdc529eb'")
        connection.commit()
    return f"keep a copy of it, then: mlflow db upgrade sqlite:///{database}"


@pytest.mark.parametrize("damage", [garbage, of_another_release])
def test_a_store_that_cannot_be_opened_is_one_line_and_costs_nothing(finished, tmp_path, capsys, damage):
    folder = Path(shutil.copytree(finished, tmp_path / "a"))
    line = damage(folder / "mlflow.db")
    workspace = checkout(folder)
    ways = (
        lambda: Store(workspace).finished("glyphs"),
        lambda: Store(workspace).clean(),
        lambda: load_model(KEY, workspace),
        lambda: import_cells(folder, workspace),
        lambda: ui.serve(workspace, 1),
    )
    for way in ways:
        with pytest.raises(UserError) as refusal:
            way()
        assert line in str(refusal.value) and "\n" not in str(refusal.value)
    capsys.readouterr()
    with open_cell(workspace, CELL, "key-0", "0") as run:
        run.log([{"iteration": 1, "loss": 0.5}])
    said = capsys.readouterr().err
    assert line in said and said.count(line) == 1 and "does not answer" not in said


def test_a_store_that_is_away_is_one_line_and_its_token_stays_secret(tmp_path, monkeypatch):
    workspace = checkout(tmp_path / "a")
    finished_cell(workspace)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}/?token=abc")
    ways = (
        lambda: Store(workspace).finished("glyphs"),
        lambda: load_model(KEY, workspace),
        lambda: import_cells(workspace.tree, workspace),
        lambda: ui.serve(workspace, 1),
    )
    for way in ways:
        with pytest.raises(UserError, match=f"MLflow at http://127.0.0.1:{port}/ does not answer: ") as refusal:
            way()
        text = str(refusal.value)
        assert "secret" not in text and "abc" not in text and "\n" not in text


def test_users_passwords_and_tokens_are_not_shown():
    assert public("at http://me:pa@ss@host/x?token=abc&b=c failed") == "at http://host/x failed"
    assert public("API request to https://host/?token=abc/api/2.0 failed") == "API request to https://host/ failed"
    assert public("sqlite:////a/b.db") == "sqlite:////a/b.db" and public("is it? a=b") == "is it? a=b"


# One run for one cell


@pytest.mark.parametrize("id", ["", "a b", "../../x", 5, "0" * 32, "x" * 999, "'"])
def test_a_damaged_id_of_a_run_is_no_obstacle(tmp_path, id):
    workspace = checkout(tmp_path / "a")
    assert handed_over(workspace, model=False, run_id=id)
    with open_trained(workspace, CELL, finished_record(workspace), later="") as run:
        pass
    assert run.complete and len(runs(Store(workspace))) == 1


def test_a_damaged_note_of_the_run_of_a_checkpoint_is_no_obstacle(tmp_path):
    workspace, file = checkout(tmp_path / "a"), tmp_path / "run_id"
    file.write_bytes(b"\xff\x00\xfe")
    for _ in range(2):
        with open_cell(workspace, CELL, KEY, "0", remember=file) as run:
            pass
        assert run.complete and file.read_text() == run.id
    assert len(runs(Store(workspace))) == 1


def test_processes_that_hand_over_one_cell_at_once_log_it_once(tmp_path):
    workspace = checkout(tmp_path / "a")
    with open_cell(workspace, CELL, KEY, "0123") as run:
        pass
    finished_cell(workspace, run_id=run.id)

    def work():
        assert hand_over(workspace, CELL, workspace.evaluation(CELL), workspace.run(CELL))

    children = [forked(work) for _ in range(3)]
    assert [ending(child) for child in children] == [0, 0, 0]
    store = Store(workspace)
    (run,) = runs(store)
    assert [m.step for m in store.client.get_metric_history(run.info.run_id, "loss")] == [*range(1, 7)]
    assert [m.step for m in store.client.get_metric_history(run.info.run_id, "recall_at_k")] == [1, 2, 4, 8]
    assert len(run.outputs.model_outputs) == 1


def test_a_model_that_is_there_can_still_be_registered(tmp_path):
    workspace = checkout(tmp_path / "a")
    assert handed_over(workspace)
    for _ in range(2):
        assert hand_over(workspace, CELL, workspace.evaluation(CELL), workspace.run(CELL), register=True)
    (model,) = Store(workspace).client.search_registered_models()
    assert model.name == f"glyphs-{CELL.name}" and len(model.latest_versions) == 1
    assert int(model.latest_versions[0].version) == 1


def test_after_a_lost_database_a_cell_has_one_run(tmp_path):
    workspace = checkout(tmp_path / "a")
    one = finished_cell(workspace, run_id="0" * 32)  # it was in a database that is not there any more
    assert hand_over(workspace, CELL, one.folder, Path("none"))
    with open_trained(workspace, CELL, one.record, later="") as run:
        run.log_text("page", "index.html")
    (found,) = runs(Store(workspace))
    assert found.info.run_id == run.id and run.complete and found.data.tags["evaluated"] == "true"


def test_a_killed_table_set_is_no_running_one(tmp_path):
    workspace = checkout(tmp_path / "a")

    def work():
        with open_tables(workspace, "glyphs", [CELL]):
            os.kill(os.getpid(), signal.SIGKILL)

    assert ending(forked(work)) == -signal.SIGKILL
    with open_tables(workspace, "glyphs", [CELL]):
        pass
    assert sorted(run.info.status for run in runs(Store(workspace), "tables")) == ["FAILED", "FINISHED"]


def test_a_folder_where_the_database_belongs_is_to_be_moved_away(tmp_path):
    workspace = checkout(tmp_path / "a")
    workspace.database.mkdir(parents=True)
    with pytest.raises(UserError, match=r"mlflow\.db: a folder, expected a database; move it away \(mv "):
        Store(workspace).finished("glyphs")


def test_a_killed_drawing_leaves_its_cell_as_it_was(tmp_path):
    workspace = checkout(tmp_path / "a")
    assert handed_over(workspace, model=False)

    def work():
        with open_trained(workspace, CELL, finished_record(workspace), later="") as run:
            run.log_text("page", "index.html")
            os.kill(os.getpid(), signal.SIGKILL)

    assert ending(forked(work)) == -signal.SIGKILL
    store = Store(workspace)
    (found,) = runs(store)
    assert found.info.status == "FINISHED" and KEY in store.finished("glyphs")


@pytest.mark.parametrize("taken", [False, True])
def test_a_damaged_model_is_replaced_when_its_cell_is_handed_over_again(tmp_path, capsys, taken):
    workspace = checkout(tmp_path / "a")
    assert handed_over(workspace)
    final = workspace.run(CELL) / "final.pt"
    whole = final.read_bytes()
    (file,) = workspace.artifacts.glob("glyphs/models/*/artifacts/artifacts/final.pt")
    assert file.samefile(final)
    if taken:
        shutil.rmtree(file.parents[1])
    else:
        file.write_bytes(b"damaged")  # and with it the run's, of which it is a hard link
    final.unlink()
    final.write_bytes(whole)  # trained again
    for _ in range(2):
        capsys.readouterr()
        assert hand_over(workspace, CELL, workspace.evaluation(CELL), workspace.run(CELL))
        assert all(each.read_bytes() == whole for each in workspace.artifacts.rglob("final.pt"))
    assert "damaged" not in capsys.readouterr().err
    (run,) = runs(Store(workspace))
    assert len(run.outputs.model_outputs) == 1 + taken


@pytest.mark.parametrize("content", [b"\xff\xfe", b"cbml_log: [", b"- 1", b"cbml_log: 5"])
def test_a_file_of_options_that_cannot_be_read_costs_the_command_alone(tmp_path, content):
    workspace = checkout(tmp_path / "a")
    file = workspace.conf / "loss/cbml_log.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert handed_over(workspace, model=False)
    (run,) = runs(Store(workspace))
    assert "| final " in run.data.tags["mlflow.note.content"]


def test_a_logged_model_says_which_columns_it_takes(finished, tmp_path):
    store = Store(checkout(copied(finished, tmp_path / "a")))
    (run,) = runs(store)
    model = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/resnet18-cbml_log-16-0")
    with pytest.raises(Exception, match="no column `image` .* or `path`"):
        model.predict(pd.DataFrame({"file": ["a.png"]}))
