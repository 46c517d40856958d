"""From a dataset's catalogue to its lists, with every image hashed and decoded once."""

import numpy as np

from cbml.data.lists import ImageList, fingerprint_of, in_lists, write_lists
from cbml.data.packing import Packing, inspect, of_two_classes, unreadable_error
from cbml.data.sources.base import check_catalogue
from cbml.files import read_csv
from cbml.progress import message
from cbml.stages.check import check_batches, check_cells
from cbml.stages.inputs import ensure_images
from cbml.workspace import Workspace


def build_lists(workspace: Workspace, dataset: str) -> dict:
    """Write the lists of a dataset; see `cbml.data.lists`.

    The decoded images are kept in the sizes that the cells of params.yaml want.

    Returns:
        The summary of the lists; with `skipped`, the number of images that cannot be read, if they are left out.

    Raises:
        UserError: the catalogue or an image is missing or damaged, or what remains cannot be trained and tested on.
    """
    cells = workspace.cells(dataset)
    config = cells[0].dataset_config
    check_cells(cells, workspace)
    text = {"path": str, "name": str, "split": str}
    table = read_csv(workspace.catalogue(dataset), "download", (*text, "label"), dtype=text, keep_default_na=False)
    table = in_lists(table)
    root, cache = ensure_images(workspace, config), workspace.cache
    sizes = list(dict.fromkeys((cell.recipe.resize, cell.recipe.interpolation) for cell in cells))

    images = ImageList(table.path.tolist(), table.label.to_numpy(np.int64))
    inspected = inspect([root / path for path in images.paths], dataset)
    packing = Packing(images, root, cache, fingerprint_of(table.split, table.path, table.label, inspected.digests))
    with packing.acquire():
        missing = [size for size in sizes if not packing.folder(size).exists()]
        unreadable = inspected.unreadable
        if missing:
            unreadable = packing.decode(packing.fitting(missing, inspected), inspected)
        if unreadable and not config.skip_unreadable:
            packing.discard()
            hint = f" (dataset.{dataset}.skip_unreadable=true leaves them out)"
            raise unreadable_error(unreadable, len(table), hint)
        kept = np.setdiff1d(np.arange(len(table)), list(unreadable))
        table, digests = table.iloc[kept], [inspected.digests[i] for i in kept]
        check_catalogue(table, root)
        check_batches(cells, table.label[table.split == "train"].to_numpy())
        fingerprint = fingerprint_of(table.split, table.path, table.label, digests)
        packing.keep(missing, inspected, kept, Packing(images.subset(kept), root, cache, fingerprint))
    pairs = of_two_classes(digests, table.label.tolist())
    if pairs:
        (one, other), more = pairs[0], f", and {len(pairs) - 1} more pairs" if len(pairs) > 1 else ""
        named = " and ".join(f"{table.path.iloc[i]} ({table.name.iloc[i]})" for i in (one, other))
        message(f"{dataset}: the same image under two classes: {named}{more}")
    facts = {"skipped": len(unreadable)} if unreadable else {}
    if facts:
        message(f"{dataset}: {len(unreadable)} images that cannot be read are left out")
    return write_lists(table, digests, workspace.lists(dataset), **facts)
