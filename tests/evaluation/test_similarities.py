"""How similar pairs are: worked by hand or by brute force."""

import math

import numpy as np
import pytest
import torch
from helpers import LargestTensor, clusters

from cbml.errors import UserError
from cbml.evaluation.retrieval import unit_vectors
from cbml.evaluation.similarities import pair_similarities


@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_similarities_are_those_of_all_pairs(block):
    embeddings, labels = clusters(5, 7)
    densities, moments = pair_similarities(embeddings, labels, block=block)
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    later = torch.ones(35, 35).triu(1).bool()
    for pair, same in (("positive", True), ("negative", False)):
        values = (unit @ unit.T)[later & ((labels[:, None] == labels) == same)].numpy()
        assert moments[pair]["pairs"] == len(values)
        assert moments[pair]["mean"] == pytest.approx(values.mean())
        assert moments[pair]["variance"] == pytest.approx(values.var())
        table = densities[densities.pair == pair]
        width = 2 / len(table)
        assert (table.density * width).sum() == pytest.approx(1)
        counts, edges = np.histogram(values, len(table), (-1, 1))
        np.testing.assert_allclose(table.density * width * len(values), counts, atol=1e-9)
        np.testing.assert_allclose(table.similarity, (edges[:-1] + edges[1:]) / 2)


def test_equal_and_opposite_pairs_are_counted():
    densities, moments = pair_similarities(torch.tensor([[3.0, 1], [3, 1], [-3, -1]]), torch.zeros(3))
    assert moments["positive"]["pairs"] == 3
    assert densities.density.iloc[[0, -1]].tolist() == pytest.approx([2 / 3 * 200, 1 / 3 * 200])
    assert moments["negative"] == {"mean": None, "variance": None, "pairs": 0}
    assert set(densities.pair) == {"positive"}


def test_one_image_makes_no_pair():
    densities, moments = pair_similarities(torch.ones(1, 3), torch.zeros(1))
    assert list(densities) == ["pair", "similarity", "density"] and not len(densities)
    assert [values["pairs"] for values in moments.values()] == [0, 0]


def test_rounding_beyond_one_loses_no_pair():
    embeddings = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    unit = unit_vectors(embeddings, "test")
    assert (unit @ unit.T).max() > 1
    _, moments = pair_similarities(embeddings, torch.arange(60).repeat(2))
    assert moments["positive"]["pairs"] == 60 and moments["negative"]["pairs"] == 120 * 119 // 2 - 60


def test_negative_pairs_are_those_of_some_images_where_there_are_many():
    embeddings, labels = clusters(20, 30)
    every, some = (pair_similarities(embeddings, labels, sample=sample) for sample in (600, 200))
    assert every[1]["negative"]["pairs"] == 600 * 599 // 2 - 20 * 30 * 29 // 2
    assert some[1]["positive"] == pytest.approx(every[1]["positive"])
    assert 0.9 < some[1]["negative"]["pairs"] / (200 * 199 // 2) < 1
    assert some[1]["negative"]["mean"] == pytest.approx(every[1]["negative"]["mean"], abs=0.02)
    assert some[1]["negative"]["variance"] == pytest.approx(every[1]["negative"]["variance"], rel=0.1)
    assert some[0].equals(pair_similarities(embeddings, labels, sample=200)[0])


def test_memory_of_pairs_is_bounded():
    embeddings, labels = clusters(20, 75)
    with LargestTensor() as largest:
        pair_similarities(embeddings, labels, block=20_000)
    assert embeddings.numel() <= largest.elements <= 40_000  # the positions of a mask's members are two numbers each


def test_pairs_of_embeddings_that_are_not_finite():
    with pytest.raises(UserError, match="embedding of image 1 is not finite"):
        pair_similarities(torch.tensor([[1.0, 0], [math.nan, 1]]), torch.zeros(2))
