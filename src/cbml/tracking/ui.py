"""MLflow's UI, opened where the cells of a dataset can be compared.

The UI (tried with 3.17) takes the columns, the order and the charts of a list of runs from the experiment's tag
`mlflow.sharedViewState.<key>` where the address has `viewStateShareKey=<key>`, and lists these views by their names.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

from cbml.errors import UserError
from cbml.progress import message
from cbml.tracking.store import Store, public
from cbml.workspace import Workspace

# Name, mode and charts of each, by its key.
VIEWS = {
    "cells": ("Cells by Recall@1", "TABLE", ("recall_at_k", "recall_at_1")),
    "recall_at_k": ("Recall@1, 2, 4, 8", "CHART", ("recall_at_k",)),
    "training": ("Recall@1 over iterations", "CHART", ("recall_at_1", "loss")),
}
METRICS: tuple[str, ...] = ("recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "map_at_r")
METRICS += ("recall_at_1_untrained", "recall_at_1_best_on_test")
PARAMS = ("loss", "backbone", "embedding_dim", "seed", "recipe")
NAME, CREATED, DATASET = "attributes.`Run Name`", "runDateAndNestInfo", "attributes.`Dataset`"
STARTS_IN = 120  # seconds, on a busy machine
# A command that ends, with its whole process group, when the pipe that is its standard input closes: at the latest when
# the process that started it is gone, even if it was killed.
AS_LONG_AS_THIS = ["sh", "-c", 'exec 3<&0 </dev/null; { cat <&3 >/dev/null; kill 0; } & exec "$@" 3<&-', "sh"]


def run_address(workspace: Workspace, run_id: str | None, port: int = 5000) -> str | None:
    """Where the UI shows a run: that of the store if it is a server, else one of this machine; None if it has none."""
    if not run_id or not (store := Store.existing(workspace)):
        return None
    try:
        experiment = store.client.get_run(run_id).info.experiment_id
    except Exception:  # the store is away, or another one than it was; a link costs no page
        return None
    ui = public(store.uri).rstrip("/") if store.uri.startswith("http") else f"http://127.0.0.1:{port}"
    # Without `workflowType` a browser that is new to it shows pages for language models.
    return f"{ui}/#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"


def view(name: str, charts: tuple[str, ...], number: int) -> str:
    """The value of a view's tag: cells by Recall@1, lines of these metrics. The UI lists the highest number first."""
    metrics = [f"metrics.`{metric}`" for metric in METRICS]
    params = [f"params.`{param}`" for param in PARAMS]
    state = {
        "orderByKey": metrics[0],
        "orderByAsc": False,
        "selectedColumns": [DATASET, *metrics, *params],
        "columnOrder": [NAME, CREATED, DATASET, *metrics, *params],
        "columnWidths": {NAME: 340, DATASET: 120} | dict.fromkeys(metrics, 92),
        "runsHiddenMode": "SHOW_ALL",  # else charts show the first ten runs
        "compareRunCharts": [
            {
                "type": "LINE",
                "uuid": metric,
                "metricKey": metric,
                "metricSectionId": "first",
                "xAxisKey": "step",
                "useGlobalXaxisKey": False,
                "xAxisScaleType": "log" if metric == "recall_at_k" else "linear",
                "scaleType": "linear",
                "lineSmoothness": 0,
                "range": {},
            }
            for metric in charts
        ],
        # The UI makes charts of all other metrics, in sections that are folded here.
        "compareRunSections": [
            {"uuid": "first", "name": name, "display": True, "columns": len(charts), "cardHeight": 480},
            {"uuid": "model", "name": "Model metrics", "display": False},
            {"uuid": "system", "name": "System metrics", "display": False},
        ],
        "isAccordionReordered": True,  # else sections are in the order of their names
    }
    return json.dumps({"name": name, "createdAt": number, "state": json.dumps(state)})


def links(store: Store, ui: str) -> dict[str, dict[str, str]]:
    """The addresses of the views at an MLflow UI, by dataset and name; writes the views that are not there."""
    found: dict[str, dict[str, str]] = {}
    for experiment in store.client.search_experiments():
        id = experiment.experiment_id
        if not store.client.search_runs([id], "tags.cell_key LIKE '%'", max_results=1):
            continue
        found[experiment.name] = {}
        for i, (key, (name, mode, charts)) in enumerate(VIEWS.items()):
            tag, value = f"mlflow.sharedViewState.{key}", view(name, charts, (experiment.creation_time or 0) - i)
            if experiment.tags.get(tag) != value:
                store.client.set_experiment_tag(id, tag, value)
            query = f"workflowType=machine_learning&compareRunsMode={mode}&viewStateShareKey={key}"
            found[experiment.name][name] = f"{ui.rstrip('/')}/#/experiments/{id}/runs?{query}"
    return found


def listed(store: Store, ui: str) -> str:
    """The links as text."""
    parts = []
    for dataset, views in links(store, ui).items():
        parts.append(f"{dataset}\n" + "".join(f"  {name}\n    {link}\n" for name, link in views.items()))
    return "\n".join(parts) or f"no cells yet in {public(store.uri)}\n"


def serve(workspace: Workspace, port: int) -> None:
    """Run MLflow's UI on a workspace's store until Ctrl-C, with the links; a store that is a server has its own UI.

    Raises:
        UserError: the port is in use, or the UI does not start.
    """
    store = Store(workspace)
    if store.uri.startswith("http"):
        with store.asked():
            print(listed(store, public(store.uri)))
        return
    with socket.socket() as probe:
        if not probe.connect_ex(("127.0.0.1", port)):
            raise UserError(f"port {port} is in use; another one: python -m pipeline.ui --port {port + 1}")
    ui = f"http://127.0.0.1:{port}"
    with store.asked():
        text = listed(store, ui)
    command = [*AS_LONG_AS_THIS, sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]
    command += ["--uvicorn-opts", "--log-level warning"]
    settings = {"MLFLOW_BACKEND_STORE_URI": store.uri, "PYTHONWARNINGS": "ignore"}
    # No processes for jobs that judge language models: they take longer to start than the UI.
    settings["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    # However this was started: a script's background jobs ignore SIGINT. Only `nohup` is to outlive its terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: sys.exit())
    message(f"MLflow's UI of {public(store.uri)} is starting")
    server = subprocess.Popen(command, env=os.environ | settings, stdin=subprocess.PIPE, start_new_session=True)
    try:
        _wait(ui, server)
        print(f"\n{text}\nCtrl-C ends it.", flush=True)
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it is ending
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def _wait(ui: str, server: subprocess.Popen) -> None:
    for _ in range(STARTS_IN):
        with suppress(OSError), urllib.request.urlopen(f"{ui}/health", timeout=1):
            return
        if server.poll() is not None:
            break
        time.sleep(1)
    raise UserError(f"{ui}: MLflow's UI did not start; what it said is above")
