"""Draw one evaluated cell: its charts, and the page with them."""

from pathlib import Path

from cbml.files import atomic_write, read_csv
from cbml.report.cell import charts
from cbml.report.cell.embedding_map import map_chart
from cbml.report.cell.page import cell_page
from cbml.report.common.evaluated import recalls_of, similarities_of
from cbml.report.common.pictures import Pictures
from cbml.spec.params import load_cell
from cbml.stages.inputs import open_data
from cbml.stages.records import curves_of, indexed, neighbours_of, record_of
from cbml.tracking.run import open_trained
from cbml.tracking.ui import run_address
from cbml.workspace import Workspace

SIDE = 96  # of a thumbnail, in pixels


def draw_cell(evaluation: Path, workspace: Workspace) -> Path:
    """Write what one trained model's embeddings look like, and how it was trained, into the folder of its page.

    Each query is a test image, its gallery the other test images or the gallery that the dataset has. Written are:

        index.html          the page, with these charts and with queries and their nearest neighbours: some picked by
                            chance, the surest failures, and the pairs of classes that are confused most often
        training.svg        Recall@1 and the loss by iteration
        recall_at_k.svg     Recall@K for K = 1, 2, 4, … 512, below the size of the list
        similarities.svg    cosine similarities of positive and negative pairs
        embedding_map.svg   some classes in two dimensions
        pseudo_labels.svg   if training was on clusters, how they compare with the classes by iteration

    The same input gives the same bytes. All choices by chance depend on the labels and the seed alone, so the pictures
    of several models can be compared.

    Args:
        evaluation: the folder that `evaluate_cell` wrote.

    Raises:
        UserError: a file of it, or an image, is missing or damaged.
    """
    cell = load_cell(evaluation / "cell.yaml", "evaluate")
    record = record_of(evaluation, "evaluate")
    data = open_data(workspace, cell)
    tested, labels = data.test, data.test.labels
    title = f"{cell.name} on {cell.dataset}"

    found = neighbours_of(evaluation, data.scoring.queries or len(labels), len(labels))
    mapped = indexed(evaluation / "map.npz", ("indices", "embeddings"), len(labels))
    losses, validations = curves_of(evaluation, cell, "evaluate")
    best = record["iterations"]["best_on_test"]
    densities, moments = similarities_of(evaluation)
    recalls = recalls_of(evaluation, len(labels) - (data.scoring.queries or 0))
    svgs = {
        "training": charts.training_chart(title, losses, validations, best),
        "recall_at_k": charts.recall_chart(title, recalls),
        "similarities": charts.similarities_chart(title, densities, moments),
        "embedding_map": map_chart(
            title, mapped["embeddings"], labels[mapped["indices"]], tested.class_names, cell.seed
        ),
    }

    if (file := evaluation / "pseudo_labels.csv").is_file():
        columns = ("iteration", "nmi", "purity", "kept_purity", "changed")
        svgs["pseudo_labels"] = charts.pseudo_labels_chart(title, read_csv(file, "evaluate", columns))

    out = workspace.page(cell)
    page = cell_page(
        cell,
        evaluation,
        svgs,
        Pictures(tested, data.ensure_images(), SIDE),
        found,
        folder=out,
        report=workspace.report(cell.dataset) / "index.html",
        index=workspace.index,
        run_address=run_address(workspace, record["run_id"]),
    )
    with atomic_write(out) as folder:
        folder.mkdir()
        for name, svg in svgs.items():
            (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
        (folder / "index.html").write_text(page, encoding="utf-8")
    with open_trained(workspace, cell, record, later="drawing it again brings the page there") as run:
        run.log_page(out)
    return out
