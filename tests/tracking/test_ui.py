"""MLflow's UI: links that open on a dataset's cells, and a server that ends with its script."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from helpers import environment, tiny_params

from cbml.errors import UserError
from cbml.spec.params import Params
from cbml.tracking import run as tracking
from cbml.tracking import ui
from cbml.tracking.store import Store
from cbml.workspace import Workspace

LOSSES = {"cbml_log": {"type": "cbml"}, "cbml_sqrt": {"type": "cbml", "form": "sqrt"}}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Two cells in a store, a table set, and somebody else's experiment."""
    root = tmp_path_factory.mktemp("root")
    workspace = Workspace(root, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        cells = Params.model_validate(tiny_params(loss=LOSSES)).cells("glyphs")
        for i, cell in enumerate(cells):
            with tracking.open_cell(workspace, cell, f"{cell.name}-0", "0123") as run:
                run.log([{"iteration": step, "recall_at_1": 40.0 + step + i, "loss": 1.0} for step in (0, 5, 10)])
                run.log([{"iteration": k, "recall_at_k": 50.0 + k + i} for k in (1, 2, 4, 8)])
        with (
            tracking.open_tables(workspace, "glyphs", cells),
            tracking.open_run(workspace, "other", "x", config={}, params={}, tags={}),
        ):
            pass
        yield workspace


def test_each_dataset_has_links_and_its_experiment_the_views_that_they_open(workspace):
    store = Store(workspace)
    (dataset,) = (found := ui.links(store, "http://here/")).keys()
    assert dataset == "glyphs" and list(found[dataset]) == [name for name, _, _ in ui.VIEWS.values()]
    experiment = store.client.get_experiment_by_name("glyphs")
    for (key, (name, mode, charts)), link in zip(ui.VIEWS.items(), found[dataset].values(), strict=True):
        assert link.startswith(f"http://here/#/experiments/{experiment.experiment_id}/runs?")
        assert f"viewStateShareKey={key}" in link and f"compareRunsMode={mode}" in link
        value = experiment.tags[f"mlflow.sharedViewState.{key}"]
        assert len(value) < 5000  # what MLflow takes
        view = json.loads(value)
        state = json.loads(view["state"])
        assert view["name"] == name and state["orderByKey"] == "metrics.`recall_at_1`"
        assert "attributes.`Dataset`" in state["selectedColumns"]
        assert [chart["metricKey"] for chart in state["compareRunCharts"]] == list(charts)
    for name in ("tables", "other"):
        assert not any("View" in tag for tag in store.client.get_experiment_by_name(name).tags)
    assert ui.links(store, "http://here/") == found


def test_a_store_without_cells_says_so(tmp_path):
    assert ui.listed(Store(Workspace(tmp_path, tmp_path)), "http://here").startswith("no cells yet in sqlite:")


def test_a_port_in_use_is_one_line(workspace):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is in use; .*--port {port + 1}"):
            ui.serve(workspace, port)


def script(root, *options, ignored=(), **variables):
    """The script, started where these signals are ignored."""

    def ignore():
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)

    command, variables = [sys.executable, "-m", "pipeline.ui", *map(str, options)], environment() | variables
    return subprocess.Popen(
        command, cwd=root, env=variables, stdout=subprocess.PIPE, text=True, preexec_fn=ignore, start_new_session=True
    )


def serving(root, **options):
    """The script when its server answers, and the addresses that it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process, lines = script(root, "--port", port, **options), []
    while process.poll() is None and "Ctrl-C ends it.\n" not in lines:
        lines.append(process.stdout.readline())
    return process, re.findall("http://.*", "".join(lines))


def answers(address):
    try:
        return urllib.request.urlopen(address.partition("#")[0] + "health", timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def served(workspace):
    """The script with its server, and the addresses that it printed."""
    process, addresses = serving(workspace.root)
    yield process, addresses
    process.kill()


@pytest.mark.slow
def test_a_store_that_is_a_server_gets_its_links_alone(workspace, served):
    server = served[1][0].partition("/#/")[0]
    process = script(workspace.root, MLFLOW_TRACKING_URI=server)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and re.findall("http://.*", output) == served[1]


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_links_open_on_the_cells_and_their_curves(served):
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install 'cbml[browser]')")
    with api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox does not run as root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1900, "height": 900})
        cells, by_k, _ = served[1]
        page.goto(cells)
        page.get_by_text("2 matching runs").wait_for(timeout=120_000)
        names = page.locator(".ag-row a[href*='/runs/']")
        assert [text for text in names.all_inner_texts() if text] == [
            f"resnet18-{loss}-16-0" for loss in ("cbml_sqrt", "cbml_log")
        ]
        page.get_by_text("recall_at_1", exact=True).first.wait_for()
        page.goto(by_k)
        for loss in LOSSES:
            page.get_by_text(f"resnet18-{loss}-16-0 (recall_at_k)").first.wait_for(timeout=120_000)
        browser.close()


@pytest.mark.slow
def test_ctrl_c_ends_the_server_too(served):
    process, (address, *_) = served
    assert answers(address)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0
    assert not answers(address)


ENDS = {"Ctrl-C": signal.SIGINT, "kill": signal.SIGTERM, "its terminal": signal.SIGHUP, "kill -9": signal.SIGKILL}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
def test_the_server_ends_with_its_script_however_that_was_started(workspace, how):
    # As a background job of a script is; a terminal that closes is no end where `nohup` says so.
    process, (address, *_) = serving(workspace.root, ignored=[signal.SIGINT])
    assert answers(address)
    os.kill(process.pid, ENDS[how])
    process.wait(timeout=60)
    patience = time.monotonic() + 60
    while answers(address) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not answers(address)


def test_nohup_outlives_its_terminal(workspace):
    process, (address, *_) = serving(workspace.root, ignored=[signal.SIGINT, signal.SIGHUP])
    os.kill(process.pid, signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None and answers(address)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 0
