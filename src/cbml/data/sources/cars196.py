"""Cars196: 16,185 photographs of 196 models of cars (Krause et al., 3dRR 2013)."""

import os.path
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pandas as pd

from cbml.data.sources.base import ClassShare, split_classes
from cbml.data.sources.layout import is_inside
from cbml.data.sources.published import PublishedConfig
from cbml.errors import UserError

ANNOTATIONS = "cars_annos.mat"


class Cars196Config(PublishedConfig):
    """Cars196: the first `split` of the classes (by id) train, the others test, as in Oh Song et al. (CVPR 2016).

    The images of both official archives are taken together; the official split and the boxes are not used. The layout
    is that of the one archive with all images, `car_ims/` beside `cars_annos.mat`: the files of the two archives that
    came later are numbered otherwise.
    """

    type: Literal["cars196"]
    split: ClassShare = 0.5

    TITLE: ClassVar = "Cars196"
    TOP: ClassVar = "cars196"
    PARTS: ClassVar = ("car_ims", ANNOTATIONS)

    def read(self, folder: Path, origin: Path) -> pd.DataFrame:
        from scipy.io import loadmat  # half a second, for this dataset alone

        if missing := [name for name in self.PARTS if not (folder / name).exists()]:
            raise UserError(
                f"{origin} is not in the layout of Cars196: {', '.join(missing)} not found; "
                f"expected car_ims (a folder) and {ANNOTATIONS}"
            )
        try:
            content = loadmat(folder / ANNOTATIONS, squeeze_me=True)
            annotations = np.atleast_1d(content["annotations"])
            paths = [str(path) for path in annotations["relative_im_path"]]
            ids = annotations["class"].astype(np.int64)
            names = [str(name) for name in np.atleast_1d(content["class_names"])]
            labelled = [names[label - 1] for label in ids.tolist()]
            if not len(ids) or ids.min() < 1:
                raise ValueError("a class id below 1, or no annotation")
        except Exception as error:  # damage shows in as many types as a .mat file has parts
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"{origin}/{ANNOTATIONS} cannot be read ({reason}); expected `annotations` with relative_im_path and "
                "class, and `class_names`"
            ) from None
        for path in paths:
            if not is_inside(path) or not os.path.isfile(folder / path):
                raise UserError(f"{origin}/{path} is missing; {ANNOTATIONS} lists it")
        columns = {"path": paths, "label": ids - 1, "name": labelled, "split": split_classes(ids, self.split)}
        return pd.DataFrame(columns)
