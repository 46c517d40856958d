"""Draw one evaluated cell: its pictures, and the page with them."""

from pathlib import Path

import numpy as np

from cbml import tracking
from cbml.config import load_cell
from cbml.evaluation import queries
from cbml.figures import charts, sheets
from cbml.figures.embedding_map import map_chart
from cbml.files import atomic_write, damaged, read_arrays, read_csv, read_json
from cbml.reporting.cell_page import cell_page
from cbml.stages.inputs import bring, curves_of, dataset_of, record_of, test_list
from cbml.workspace import Workspace

ROWS = 8  # of a sheet
NO_FAILURE = ": none, every query's nearest neighbour is of its own class"


def draw_cell(evaluation: Path, workspace: Workspace) -> Path:
    """Write what one trained model's embeddings look like, and how it was trained, into the folder of its page.

    Each query is a test image, its gallery the other test images or the gallery that the dataset has. Written are:

        index.html          the page
        gallery.jpg         queries picked by chance, one per class, and their nearest neighbours
        failures.jpg        the wrong nearest neighbours of the highest similarity
        confusions.jpg      the pairs of classes that are confused most often
        similarities.svg    cosine similarities of positive and negative pairs
        recall_at_k.svg     Recall@K for K = 1, 2, 4, … 512, below the size of the list
        training.svg        Recall@1 and the loss by iteration
        embedding_map.svg   some classes in two dimensions

    The same input gives the same bytes. All choices by chance depend on the labels and the seed alone, so the pictures
    of several models can be compared.

    Args:
        evaluation: the folder that `evaluate_cell` wrote.

    Raises:
        UserError: a file of it, or an image, is missing or damaged.
    """
    cell = load_cell(evaluation / "cell.yaml")
    record = record_of(evaluation)
    tested, search = test_list(workspace, cell)
    labels = tested.labels
    root = bring(workspace, dataset_of(workspace, cell))
    files = [root / path for path in tested.paths]
    names = tested.class_names
    title = f"{cell.name} on {cell.dataset}"

    found = _arrays(evaluation / "neighbours.npz", ("indices", "similarities"), len(labels))
    if len(found["indices"]) != (search.queries or len(labels)):
        raise damaged(evaluation / "neighbours.npz", "of another list", "evaluate")
    judged = queries.judge(found["indices"], found["similarities"], labels)
    failed = queries.failures(judged)
    pairs = queries.confusions(judged).head(ROWS)
    mapped = _arrays(evaluation / "map.npz", ("indices", "embeddings"), len(labels))
    losses, validations = curves_of(evaluation, cell)
    best = record["iterations"]["best_on_test"]
    densities = read_csv(evaluation / "similarities.csv", "evaluate", ("split", "pair", "similarity", "density"))
    moments = read_json(evaluation / "similarities.json", "evaluate", ("train", "test"))
    svgs = {
        "training": charts.training_chart(title, losses, validations, best),
        "recall_at_k": charts.recall_chart(
            title, read_csv(evaluation / "recall_at_k.csv", "evaluate", ("k", "recall"))
        ),
        "similarities": charts.similarities_chart(title, densities, moments),
        "embedding_map": map_chart(title, mapped["embeddings"], labels[mapped["indices"]], names, cell.seed),
    }

    out = workspace.page(cell)
    with atomic_write(out) as folder:
        folder.mkdir()
        for name, svg in svgs.items():
            (folder / f"{name}.svg").write_text(svg)
        for name, subtitle, chosen in (
            ("gallery", "Queries picked by chance, one per class", queries.pick(judged, ROWS, cell.seed)),
            ("failures", "The surest failures, one per class", queries.surest(failed, ROWS)),
        ):
            rows = {query: list(zip(*(found[name][query].tolist() for name in found), strict=True)) for query in chosen}
            subtitle += ", and their nearest neighbours with their cosine similarity" if rows else NO_FAILURE
            sheet = sheets.neighbour_sheet(title, subtitle, rows, files, labels.tolist(), names)
            sheets.save_jpeg(sheet, folder / f"{name}.jpg")
        subtitle = "The most frequent confusions" + (", with the surest failure of each" if len(pairs) else NO_FAILURE)
        sheets.save_jpeg(sheets.confusion_sheet(title, subtitle, pairs, files, names), folder / "confusions.jpg")
        (folder / "index.html").write_text(cell_page(cell, evaluation, folder))
    opened = tracking.open_cell(workspace, cell, record["key"], record["fingerprint"], run_id=record["run_id"])
    with opened as run:
        run.log_folder(out)
    return out


def _arrays(file: Path, names: tuple[str, ...], images: int) -> dict[str, np.ndarray]:
    """The arrays of a file that evaluation wrote: all of one length, and `indices` of a list of so many images."""
    found = read_arrays(file, "evaluate", names)
    indices = found["indices"]
    same = len({len(array) for array in found.values()}) == 1
    if not (same and indices.size and 0 <= indices.min() <= indices.max() < images):
        raise damaged(file, "of another list", "evaluate")
    return found
