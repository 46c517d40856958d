"""A trained cell as a folder for use elsewhere, with a model card. Its layout is that of the Hugging Face Hub."""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from cbml.errors import UserError
from cbml.files import read_json
from cbml.report.common.numbers import metrics, number
from cbml.report.tables.markdown import pipe_table
from cbml.report.tables.rows import PROTOCOLS
from cbml.spec.cell import Cell
from cbml.stages.embed import load_model
from cbml.stages.records import record_of
from cbml.trained import portable
from cbml.workspace import Workspace

LOADING = """
```python
from cbml import trained

model = trained.load("FOLDER")  # this one
embeddings = model.embed(["a.jpg", "b.jpg"])  # (2, {size}) float32, of unit norm
```
"""


def export_model(name: str, out: Path, workspace: Workspace) -> Path:
    """Write the model to the folder `out`; see `Trained.export` and `model_card`.

    Args:
        name: see `load_model`.

    Raises:
        UserError: there is no such model, it cannot be exported, or `out` exists.
    """
    model = load_model(name, workspace)
    return model.export(out, model_card(model.cell, scores_of(name, model.cell, workspace), model.embedding_dim))


def scores_of(name: str, cell: Cell, workspace: Workspace) -> dict[str, dict[str, float]]:
    """What was measured of a model, by protocol; nothing if its evaluation is neither here nor in the store."""
    try:
        key = record_of(Path(name))["key"] if Path(name).is_dir() else name
    except UserError:  # an exported folder, which has no record
        return {}
    evaluation: Path | None = workspace.evaluation(cell)
    if not _is_of(key, workspace.evaluation(cell)):
        from cbml.tracking.store import Store  # MLflow takes seconds to import

        if not (store := Store.existing(workspace)):
            return {}
        evaluation = store.finished(cell.dataset).get(key)
    return read_json(evaluation / "metrics.json", "evaluate", ("final",)) if evaluation else {}


def _is_of(key: str, evaluation: Path) -> bool:
    try:
        return record_of(evaluation)["key"] == key
    except UserError:  # it is not there
        return False


def model_card(cell: Cell, scores: dict[str, dict[str, float]], size: int) -> str:
    """README.md of an exported model: what it is, figures with their protocol, data, recipe, origin, how to load it.

    Args:
        scores: by protocol; none if they are not known.
        size: of its embeddings.
    """
    head: dict[str, Any] = {
        "library_name": "cbml",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["metric-learning", "image-retrieval", cell.loss, cell.backbone],
    }
    parts = [
        f"# {cell.name} on {cell.dataset}",
        f"Images become unit vectors of {size} numbers; similar images have a high cosine similarity. Backbone "
        f"`{cell.backbone}`, method `{cell.loss}`, seed {cell.seed}, trained on the training classes of "
        f"`{cell.dataset}`, and tested on others.",
    ]
    figures = "Not known where this was exported."
    if scores:
        names = metrics(scores["final"])
        results = [
            {"type": name, "name": f"{name}, final, percent", "value": round(scores["final"][name], 2)}
            for name in names
        ]
        entry = {"task": {"type": "image-feature-extraction"}, "dataset": {"name": cell.dataset, "type": cell.dataset}}
        head["model-index"] = [{"name": cell.name, "results": [entry | {"metrics": results}]}]
        rows = [[name, *(number(of.get(each, float("nan"))) for each in names)] for name, of in scores.items()]
        table = pipe_table(pd.DataFrame(rows, columns=["protocol", *names]))
        known = PROTOCOLS | {"untrained": "the network before training"}
        lines = "\n".join(f"- `{name}`: {known[name]}" for name in scores)
        figures = f"On the test list, in percent.\n\n{table}\n\n{lines}"
    config = portable(cell).to_dict()
    shown = {name: config[name] for name in ("dataset", "recipe", "loss")}
    parts += ["## Figures", figures]
    parts += ["## Data, recipe and loss", f"```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"]
    parts += ["## Weights that it started from", _origin(cell)]
    parts += ["## How to load it", LOADING.format(size=size).strip()]
    parts += [
        f"`model.onnx` needs no cbml. It takes `images`, (B, 3, {cell.recipe.crop}, {cell.recipe.crop}), RGB of 0–255 "
        f"as float32, resized to a short side of {cell.recipe.resize} and cropped in the centre, and gives "
        f"`embeddings`, (B, {size})."
    ]
    parts += ["## Licence", "None is named. Weights that it started from, and images, have licences of their own."]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def _origin(cell: Cell) -> str:
    backbone = cell.backbone_config
    if backbone.weights is None:
        return "None: trained from scratch."
    if backbone.weights == "imagenet":
        published = backbone.published
        return (
            f"ImageNet: {f'{published.url}, SHA-256 {published.sha256}…' if published else f'timm, {backbone.model}'}."
        )
    return f"A file of the trainer's own, `{Path(backbone.weights).name}`."
