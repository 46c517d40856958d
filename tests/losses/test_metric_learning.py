"""CBML as a loss of pytorch-metric-learning, with what that library does with its losses."""

import socket

import numpy as np
import pytest
import torch
from loss_options import sample
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, samplers, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.inference import CustomKNN
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices, get_all_triplets_indices

from cbml.errors import UserError
from cbml.losses import CBML
from cbml.losses.metric_learning import CBMLLoss, CrossBatchMemory

FORMS = [{"form": "log"}, {"form": "sqrt", "weight": 2.0}, {"form": "const", "adaptive_neg": False, "top_negatives": 3}]


def with_gradient(loss, embeddings, *arguments):
    embeddings = embeddings.detach().requires_grad_()
    value = loss(embeddings, *arguments)
    return value.detach(), *torch.autograd.grad(value, embeddings)


@pytest.mark.parametrize("parameters", FORMS, ids=str)
def test_it_is_cbml(parameters):
    embeddings, labels = sample()
    embeddings = 3 * embeddings
    expected = with_gradient(CBML(**parameters), embeddings, labels)
    assert isinstance(CBMLLoss(), losses.BaseMetricLossFunction)
    for selected in (None, get_all_pairs_indices(labels), get_all_triplets_indices(labels)):
        found = with_gradient(CBMLLoss(CBML(**parameters)), embeddings, labels, selected)
        if selected is None or len(selected) == 4:  # in triplets there are no anchors without a positive
            torch.testing.assert_close(found, expected)
        else:
            torch.testing.assert_close(found[0], expected[0])


def test_a_miners_pairs_stand_for_all_of_them():
    """One anchor with one positive and two of its three negatives, as a formula."""
    angles = torch.tensor([0.0, 0.8, 0.7, 0.9, 2.0], dtype=torch.float64)
    embeddings, labels = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([0, 0, 1, 1, 1])
    indices = [torch.tensor(each) for each in ([0], [1], [0, 0], [2, 4])]
    positive, negatives = angles[1].cos(), angles[[2, 4]].cos()
    mined = negatives[negatives + 0.1 > positive]  # the nearer alone
    xi = 0.2 * positive + 0.8 * negatives.mean()
    cost = (-(positive - 0.5) / 0.5).exp().log1p() + ((mined - 1) / 0.01).exp().sum().log1p()
    cost = cost + (negatives - xi).square().sum()
    assert len(mined) == 1
    torch.testing.assert_close(CBMLLoss()(embeddings, labels, indices), cost / 5)
    for reducer, expected in (
        (reducers.SumReducer(), cost),
        (reducers.AvgNonZeroReducer(), cost),
        (reducers.ThresholdReducer(high=cost - 1e-9), torch.tensor(0.0).double()),
        (reducers.ClassWeightedReducer(torch.tensor([3.0, 1.0])), 3 * cost / 5),
        (reducers.PerAnchorReducer(), cost / 5),
    ):
        torch.testing.assert_close(CBMLLoss(reducer=reducer)(embeddings, labels, indices), expected)
    single, two = CBMLLoss(), [torch.tensor([0]), torch.tensor([1]), torch.tensor([2])]
    assert single(embeddings, labels, two) == 0  # as any pair loss of the library


def test_its_regularizers_and_distances():
    embeddings, labels = sample()
    plain = CBMLLoss()(embeddings, labels)
    regularized = CBMLLoss(embedding_regularizer=regularizers.LpRegularizer(), embedding_reg_weight=0.5)
    torch.testing.assert_close(regularized(3 * embeddings, labels), plain + 1.5)
    dot = CBMLLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False))
    torch.testing.assert_close(dot(embeddings, labels), plain)
    with pytest.raises(UserError, match="CBMLLoss: LpDistance is no similarity; allowed: CosineSimilarity"):
        CBMLLoss(distance=distances.LpDistance())


def test_half_precision_is_raised():
    embeddings, labels = sample(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(CBMLLoss()(embeddings, labels), CBMLLoss()(embeddings.clone(), labels))
        found = CBMLLoss()(embeddings, labels)
    assert torch.equal(found, CBMLLoss()(embeddings, labels))
    assert CBMLLoss()(embeddings.bfloat16(), labels).dtype == torch.float32


def test_the_memory_adds_pairs_with_earlier_batches():
    """Anchors of the last batch among all that is remembered, themselves left out."""
    embeddings, labels = sample(tuple(range(4)) * 4)
    memory = CrossBatchMemory(CBMLLoss(), embeddings.shape[1], memory_size=12)
    for start in range(0, 16, 4):
        rows = torch.arange(start, start + 4)
        kept = torch.arange(max(0, start - 8), start + 4)
        found = memory(embeddings[rows], labels[rows])
        same = labels[rows, None] == labels[kept]
        costs = CBML().by_anchor(embeddings[rows] @ embeddings[kept].T, same & (rows[:, None] != kept), ~same)
        torch.testing.assert_close(found, sum(cost.mean() for cost in costs))
    with pytest.raises(Exception, match="not supported"):
        losses.CrossBatchMemory(CBMLLoss(), 8)  # it goes by the names of classes


def distributed(rank, port, file):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    embeddings, labels = sample((0, 0, 1, 1, 2, 2, 0, 1))
    mine = slice(4 * rank, 4 * rank + 4)
    results = []
    for efficient in (False, True):
        wrapper = DistributedLossWrapper(CBMLLoss(), efficient=efficient)
        results.append(with_gradient(wrapper, embeddings[mine], labels[mine]))
    torch.save(results, f"{file}.{rank}")
    torch.distributed.destroy_process_group()


def test_on_two_processes_it_is_the_loss_of_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(distributed, (port, tmp_path / "found"), nprocs=2)
    embeddings, labels = sample((0, 0, 1, 1, 2, 2, 0, 1))
    value, gradient = with_gradient(CBML(), embeddings, labels)
    (whole, own), (other_whole, other_own) = (torch.load(tmp_path / f"found.{rank}") for rank in (0, 1))
    for found in (whole, other_whole):  # the wrapper multiplies by the processes, over which DDP averages
        torch.testing.assert_close(found[0] / 2, value)
    torch.testing.assert_close(torch.cat([whole[1], other_whole[1]]) / 2, gradient)
    torch.testing.assert_close((own[0] + other_own[0]) / 4, value)  # each process its anchors


class Points(torch.utils.data.Dataset):
    """Classes that differ in two of eight coordinates."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.arange(6).repeat_interleave(8)
        angles = self.targets * 2 * torch.pi / 6
        self.points = torch.randn(48, 8, generator=generator)
        self.points[:, 0], self.points[:, 1] = angles.cos(), angles.sin()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.points[index], self.targets[index]


def test_it_learns_in_the_librarys_trainer_and_its_testing_tools_see_it():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (the sampler draws from it)
    train_set, test_set = Points(0), Points(1)
    trunk = torch.nn.Linear(8, 8)
    calculator = AccuracyCalculator(include=("precision_at_1",), knn_func=CustomKNN(distances.CosineSimilarity()))
    tester = testers.GlobalEmbeddingSpaceTester(dataloader_num_workers=0, accuracy_calculator=calculator)

    def precision(epoch):
        found = tester.test({"test": test_set}, epoch, trunk)["test"]
        return found["precision_at_1_level0"]

    before = precision(0)
    trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), 0.01)},
        batch_size=24,
        loss_funcs={"metric_loss": CBMLLoss(reducer=reducers.AvgNonZeroReducer())},
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
        dataset=train_set,
        sampler=samplers.MPerClassSampler(train_set.targets, 4, length_before_new_iter=24 * 40),
        dataloader_num_workers=0,
        set_min_label_to_zero=False,
    ).train(num_epochs=1)
    assert precision(1) > before + 0.2
