"""What does not fit together is said by the first stage that can know it."""

from pathlib import Path

import pytest
import yaml
from helpers import TINY_RECIPE, tiny_params

from cbml.errors import UserError
from cbml.stages.build_lists import build_lists
from cbml.stages.download import download
from cbml.workspace import Workspace


@pytest.mark.parametrize("stage", [download, build_lists])
def test_a_batch_of_more_classes_than_there_are_names_the_flag_before_training(project, stage):
    recipe = TINY_RECIPE | {"batch_size": 28, "instances": 4}
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params(recipe=recipe)))
    for name in ("data", "lists"):
        Path(name).rename(f"old-{name}")
        Path(name).mkdir()
    for file in Path("old-data").iterdir():
        Path("data", file.name).symlink_to(file.resolve())
    before = {*Path("lists").iterdir()}
    with pytest.raises(UserError, match=r"= 7 classes a batch, but the training list has 6; .* -S recipe.instances=7$"):
        stage(Workspace.here(), "glyphs")
    assert {*Path("lists").iterdir()} == before
