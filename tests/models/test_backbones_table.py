import importlib.util
import sys
from pathlib import Path

import pytest

from cbml.errors import UserError
from cbml.models import BackboneConfig
from cbml.models import __main__ as table

ROOT = Path(__file__).parents[2]
INPUT = {"mean": [0, 0, 0], "std": [1, 1, 1]}


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["backbones", *map(str, arguments)])
    table.main()


def test_table_of_the_shipped_entries(monkeypatch, capsys):
    run(monkeypatch, ROOT / "conf/backbone")
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["resnet18"] == ["11,176,512", rows["resnet18"][1], "512", "227"]
    assert rows["bn_inception"][0] == "10,270,240"
    assert {"googlenet", "resnet34", "resnet50", "resnet101", "resnet152", "resnet50_caffe"} <= rows.keys()
    if importlib.util.find_spec("timm"):
        assert rows["vit_small_patch16_224"][0::3] == ["21,665,664", "224"]
        assert rows["vit_small_patch14_dinov2"][2:] == ["384", "224"]  # as its entry says; the model's own is 518
        assert rows["convnext_tiny"][2:] == ["768", "224"]


def test_flops_of_resnet18_by_hand():
    """3×3 convolutions of 64 channels on 56² and their equals in later stages: the published 1.8 G multiply-adds."""
    stem = 112**2 * 64 * 3 * 49
    stage1 = 4 * 56**2 * 64 * 64 * 9
    later = sum(side**2 * (c // 2 * c * 9 + 3 * c * c * 9 + c // 2 * c) for c, side in ((128, 28), (256, 14), (512, 7)))
    config = BackboneConfig(type="resnet18", pooling="avg", input=INPUT)
    assert table.trunk_size(config, 224) == (11_176_512, 2 * (stem + stage1 + later), 512)


def test_bad_folder_and_bad_entry(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"no \*.yaml there"):
        run(monkeypatch, tmp_path)
    (tmp_path / "a.yaml").write_text("a:\n  type: resnet18\n  poling: avg\n")
    with pytest.raises(UserError, match=r"a.yaml: a: unknown parameter poling; allowed: type"):
        run(monkeypatch, tmp_path)


def test_missing_timm_leaves_its_row_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "a.yaml").write_text("a:\n  type: timm\n  model: resnet18\n")
    run(monkeypatch, tmp_path)
    assert "a: left out: " in capsys.readouterr().err
