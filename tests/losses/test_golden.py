"""CBML and multi-similarity against values and gradients of the authors' published code (`golden_losses.json`, `.npz`).

Of their options, `type` is our `form`, `hyper` is `gamma`, `margin` is `margin`, `adaptive` is `adaptive_neg`, and
`weight` is `variance_weight`. Their multi-similarity has none: alpha 2, beta 40, base 0.5, epsilon 0.1.

No negative of these batches is near enough to cost CBML anything (exp((0.71 − 1) / 0.01) at most): the constants of its
negative part and `adaptive_neg` are tested against the loop over anchors alone.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from loss_options import build, value_and_gradient

HERE = Path(__file__).parent
CASES = json.loads((HERE / "golden_losses.json").read_text())["cases"]
OURS = {
    "type": "form",
    "hyper": "gamma",
    "margin": "margin",
    "adaptive": "adaptive_neg",
    "weight": "variance_weight",
}
FIXED = {"cbml": {}, "multi_similarity": {"alpha": 2.0, "beta": 40.0, "base": 0.5, "epsilon": 0.1}}
TOLERANCE = 2e-6  # measured: 3e-7 of the value, and of the largest entry of the gradient


@pytest.fixture(scope="module")
def arrays():
    with np.load(HERE / "golden_losses.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['loss']} {case['options']} {case['batch']}")
def test_equals_the_authors_code(case, arrays):
    parameters = FIXED[case["loss"]] | {OURS[name]: value for name, value in case["options"].items()}
    embeddings, labels = arrays[f"{case['batch']}_embeddings"], arrays[f"{case['batch']}_labels"].long()
    value, gradient = value_and_gradient(build(case["loss"], **parameters), embeddings, labels)
    expected = arrays[f"{case['case']}_gradient"]
    assert value.item() == pytest.approx(case["value"], rel=TOLERANCE, abs=0)
    assert (gradient[:, : expected.shape[1]] - expected).abs().max() <= TOLERANCE * expected.abs().max()
