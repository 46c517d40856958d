import math
import warnings

import literal_retrieval
import numpy as np
import pytest
import torch
from helpers import LargestTensor, clusters

from cbml.errors import UserError
from cbml.evaluation import recall_at_k, retrieval
from cbml.evaluation.metrics import affords_nmi, evaluate
from cbml.evaluation.retrieval import RESOLUTION, error_bound, largest, products, retrieve, search_dtype

SCORES = ["recall_at_1", "recall_at_2", "recall_at_4", "recall_at_8", "r_precision", "map_at_r"]


def literal_evaluate(queries, labels, gallery=None, gallery_labels=None, ks=(1, 2, 4, 8)):
    """One query at a time: sort by (similarity, other classes first), walk down the list."""
    self_retrieval = gallery is None
    if self_retrieval:
        gallery, gallery_labels = queries, labels
    unit_q, unit_g = ([[x / math.hypot(*v) for x in v] for v in m.double().tolist()] for m in (queries, gallery))
    labels, gallery_labels = labels.tolist(), gallery_labels.tolist()
    rows = []
    for i, q in enumerate(unit_q):
        ranked = sorted(
            (-round(sum(a * b for a, b in zip(q, g, strict=True)), 8), gallery_labels[n] == labels[i])
            for n, g in enumerate(unit_g)
            if not (self_retrieval and n == i)
        )
        relevant = [same for _, same in ranked]
        r = sum(relevant)
        if r:
            precisions = [sum(relevant[:n]) / n for n in range(1, r + 1)]
            average = sum(p for p, same in zip(precisions, relevant, strict=False) if same) / r
            rows.append([float(any(relevant[:k])) for k in ks] + [precisions[-1], average])
    means = [100 * sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return {
        **dict(zip([f"recall_at_{k}" for k in ks] + ["r_precision", "map_at_r"], means, strict=True)),
        "queries": len(rows),
        "queries_without_answer": len(unit_q) - len(rows),
    }


def literal_retrieve(queries, labels, k, gallery=None, gallery_labels=None):
    """One query at a time: sort all others by (similarity, other classes first, index)."""
    self_retrieval = gallery is None
    if self_retrieval:
        gallery, gallery_labels = queries, labels
    unit_q, unit_g = ([[x / math.hypot(*v) for x in v] for v in m.double().tolist()] for m in (queries, gallery))
    indices, similarities = [], []
    for i, q in enumerate(unit_q):
        cosines = [sum(a * b for a, b in zip(q, g, strict=True)) for g in unit_g]
        ranked = sorted(
            (-round(cosine, 8), bool(gallery_labels[n] == labels[i]), n)
            for n, cosine in enumerate(cosines)
            if not (self_retrieval and n == i)
        )
        indices.append([n for *_, n in ranked[:k]])
        similarities.append([cosines[n] for n in indices[-1]])
    return indices, similarities


def make_data(seed, n=90, d=6, classes=11, ties=False):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.randn(classes, d, generator=generator)
    embeddings = centres[labels] + torch.randn(n, d, generator=generator)
    if ties:  # few directions, at various lengths
        embeddings = embeddings[:, :3].sign() * torch.randint(1, 9, (n, 1), generator=generator)
    return embeddings, labels


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_self_retrieval_agrees_with_literal_loop(seed, ties):
    data = make_data(seed, ties=ties)
    assert evaluate(*data) == pytest.approx(literal_evaluate(*data), abs=1e-10)


@pytest.mark.parametrize("ties", [False, True])
def test_gallery_agrees_with_literal_loop(ties):
    data = *make_data(0, n=50, classes=14, ties=ties), *make_data(1, n=70, ties=ties)
    expected = literal_evaluate(*data, ks=(1, 3, 100))
    assert expected["queries_without_answer"] > 0
    assert evaluate(*data, ks=(1, 3, 100)) == pytest.approx(expected, abs=1e-10)


def test_hand_computed():
    """Seen from 0° (class 0): its own at 10°, another class at 20°, its own at 30° and 40°: R = 3."""
    angles = torch.tensor([10.0, 20.0, 30.0, 40.0]).deg2rad()
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    metrics = evaluate(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), gallery, torch.tensor([0, 1, 0, 0]), ks=(1,))
    scores = {"recall_at_1": 100, "r_precision": 200 / 3, "map_at_r": 100 * (1 + 2 / 3) / 3}
    assert metrics == pytest.approx(scores | {"queries": 1, "queries_without_answer": 0})


def random(generator, n, d):
    return torch.randn(n, d, generator=generator), torch.arange(n) % 40


def clustered(generator, n, d):
    labels = torch.randint(40, (n,), generator=generator)
    return torch.randn(40, d, generator=generator)[labels] + 2 * torch.randn(n, d, generator=generator), labels


def duplicated(generator, n, d):
    """Each vector some eight times, in classes of its own and in others."""
    embeddings, labels = clustered(generator, n, d)
    return embeddings[torch.randint(n // 8, (n,), generator=generator)], labels


def near_ties(generator, n, d):
    """Each vector some eight times, so little moved that many similarities differ by about 2^-23."""
    embeddings, labels = duplicated(generator, n, d)
    return embeddings + 3e-4 * torch.randn(n, d, generator=generator), labels


def half_precision(generator, n, d):
    embeddings, labels = clustered(generator, n, d)
    return embeddings.bfloat16(), labels


def nearly_collapsed(generator, n, d):
    embeddings, labels = clustered(generator, n, d)
    return 1 + 1e-3 * embeddings.double(), labels


def few_classes(generator, n, d):
    """Large R, a class with one image, and zeros."""
    embeddings, labels = clustered(generator, n, d)
    embeddings[::50] = 0
    labels %= 3
    labels[0] = 5
    return embeddings, labels


KINDS = [random, clustered, duplicated, near_ties, half_precision, nearly_collapsed, few_classes]


@pytest.mark.parametrize("self_retrieval", [True, False])
@pytest.mark.parametrize("block", [retrieval.BLOCK, 30_000])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64_throughout(kind, block, self_retrieval):
    generator = torch.Generator().manual_seed(0)
    embeddings, labels = kind(generator, 700, 48)
    data = (embeddings, labels) if self_retrieval else (embeddings[:300], labels[:300], embeddings[300:], labels[300:])
    for ks in ((1, 2, 4, 8), (1, 64)):
        assert evaluate(*data, ks=ks, block=block) == pytest.approx(literal_retrieval.evaluate(*data, ks=ks), abs=1e-10)
    indices, similarities = retrieve(*data[:2], 8, *data[2:], block=block)
    expected_indices, expected_similarities = literal_retrieval.retrieve(*data[:2], 8, *data[2:])
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(similarities, expected_similarities, atol=3e-10, rtol=0)


@pytest.mark.parametrize("kind", [near_ties, nearly_collapsed])
def test_without_the_second_look_float32_would_be_wrong(kind, monkeypatch):
    data = kind(torch.Generator().manual_seed(0), 700, 48)
    monkeypatch.setattr(retrieval, "error_bound", lambda width: 0.0)
    assert evaluate(*data) != pytest.approx(literal_retrieval.evaluate(*data), abs=1e-10)


def test_the_whole_gallery_is_searched_where_candidates_do_not_settle_it(monkeypatch):
    """Among more equals than there are candidates, and only then."""
    searched = []
    whole = retrieval.Search.whole
    monkeypatch.setattr(retrieval.Search, "whole", lambda self, rows: searched.append(len(rows)) or whole(self, rows))
    for kind, settled in ((clustered, True), (nearly_collapsed, False)):
        data = kind(torch.Generator().manual_seed(0), 700, 48)
        for search in (lambda data: evaluate(*data), lambda data: retrieve(*data, 8)):
            searched.clear()
            search(data)
            assert sum(searched) < 35 if settled else sum(searched) > 350


@pytest.mark.parametrize("width", [1, 3, 512, 2048])
@pytest.mark.parametrize("vector", [torch.ones, lambda width: torch.rand(width, generator=torch.manual_seed(0))])
def test_products_are_within_the_error_bound_of_the_cosines(width, vector):
    """Equal vectors with entries of one sign are the worst case: all partial sums grow, and round alike."""
    unit = torch.nn.functional.normalize(vector(width).double(), dim=0).repeat(50, 1)
    error = (products(unit.float(), unit.float()).double() - 1).abs().max()
    assert error <= error_bound(width)


def test_products_are_float32_whatever_is_allowed_elsewhere():
    embeddings, _ = random(torch.Generator().manual_seed(0), 100, 512)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = products(unit, unit)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.dtype == torch.float32
    assert (found - unit.double() @ unit.double().T).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_float64_throughout_where_the_environment_allows_less_than_float32(name, monkeypatch):
    expected = evaluate(*(data := make_data(0)))
    assert search_dtype(torch.device("cuda")) == torch.float64
    monkeypatch.setenv(name, "BF16")
    assert search_dtype(torch.device("cpu")) == torch.float64
    assert evaluate(*data) == expected
    assert retrieve(*data, 8)[0].tolist() == literal_retrieve(*data, 8)[0]


@pytest.mark.parametrize("k", [1, 5, 40, 99, 100, 200])
def test_largest(k):
    values = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    columns = largest(values, k)
    expected = values.topk(min(k, 100)).values
    assert torch.equal(values.gather(1, columns).sort(dim=1, descending=True).values, expected)


@pytest.mark.parametrize("self_retrieval", [True, False])
def test_agrees_with_pytorch_metric_learning(self_retrieval):
    accuracy_calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    names = {"recall_at_1": "precision_at_1", "r_precision": "r_precision", "map_at_r": "mean_average_precision_at_r"}
    calculator = accuracy_calculator.AccuracyCalculator(
        include=tuple(names.values()),
        k="max_bin_count",
        device=torch.device("cpu"),
        knn_func=inference.CustomKNN(distances.CosineSimilarity()),
    )
    data = make_data(5, n=200)
    if not self_retrieval:
        data += make_data(6, n=150)
    theirs, ours = calculator.get_accuracy(*data), evaluate(*data)
    for name, their_name in names.items():
        assert ours[name] == pytest.approx(100 * theirs[their_name], abs=1e-4), name


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("block", [1, 90, 700])
def test_block_size_does_not_matter(block, ties):
    embeddings, labels = make_data(2, ties=ties)
    assert evaluate(embeddings, labels, block=block) == pytest.approx(evaluate(embeddings, labels), abs=1e-10)
    whole = retrieve(embeddings, labels, 20)
    for ours, theirs in zip(retrieve(embeddings, labels, 20, block=block), whole, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ties", [False, True])
def test_order_of_the_input_does_not_matter(ties):
    embeddings, labels = make_data(3, ties=ties)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert evaluate(embeddings[order], labels[order]) == pytest.approx(evaluate(embeddings, labels), abs=1e-10)


@pytest.mark.parametrize(
    "vector", [torch.zeros(513), torch.ones(513), torch.randn(513, generator=torch.Generator().manual_seed(0))]
)
@pytest.mark.parametrize("order", ["sorted", "interleaved"])
def test_equal_embeddings_score_zero(vector, order):
    labels = torch.arange(60).sort().values // 6 if order == "sorted" else torch.arange(60) % 10
    metrics = evaluate(vector.repeat(60, 1), labels, block=7 * 60)
    assert [metrics[name] for name in SCORES] == [0.0] * len(SCORES)


def test_nearly_collapsed_embeddings_are_still_ranked():
    """Similarities that all lie within 1e-4 of 1 are no ties: float32 tells them apart."""
    embeddings, labels = make_data(4)
    embeddings = torch.cat([3e-3 * embeddings, torch.ones(len(labels), 1)], dim=1)
    assert evaluate(embeddings, labels) == pytest.approx(literal_evaluate(embeddings, labels), abs=2)
    assert evaluate(embeddings, labels)["recall_at_1"] > 30


def test_duplicates_of_the_query_are_kept():
    embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert evaluate(embeddings, torch.tensor([0, 0, 1, 1]))["recall_at_1"] == 100
    indices, similarities = retrieve(embeddings, torch.tensor([0, 0, 1, 1]), 1)
    assert indices.tolist() == [[1], [0], [3], [2]]
    assert similarities.tolist() == [[1.0]] * 4


def test_singleton_class_is_left_out_and_counted():
    embeddings, labels = make_data(0)
    metrics = evaluate(torch.cat([embeddings, -embeddings[:1]]), torch.cat([labels, labels[:1] + 99]))
    assert (metrics["queries"], metrics["queries_without_answer"]) == (90, 1)
    assert evaluate(torch.eye(3), torch.tensor([0, 0, 1]), ks=(2,))["recall_at_2"] == 100


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("self_retrieval", [True, False])
def test_retrieve_agrees_with_literal_loop(self_retrieval, ties):
    queries, labels = make_data(0, n=50, classes=14, ties=ties)
    data = () if self_retrieval else make_data(1, n=70, ties=ties)
    indices, similarities = retrieve(queries, labels, 9, *data)
    expected = literal_retrieve(queries, labels, 9, *data)
    assert indices.dtype == torch.int64 and indices.tolist() == expected[0]
    assert similarities.dtype == torch.float64
    torch.testing.assert_close(similarities, torch.tensor(expected[1], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("steps", [0, 0.5, 1 - 2**-12, 1, 1 + 2**-6, 1.5])
@pytest.mark.parametrize("turned", [False, True])
def test_the_first_neighbour_is_that_of_recall_at_1_also_at_a_tie(steps, turned):
    """One of another class is so many times 2^-23 less similar than the query's own: up to 1 it comes first."""
    cosines = torch.tensor([0.9, 0.9 - steps * RESOLUTION, *[0.1] * 98], dtype=torch.float64)
    gallery = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    labels = torch.tensor([0, 1] + [2] * 98)
    if turned:  # the index does not matter
        gallery, labels = gallery.flip(0), labels.flip(0)
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([0])
    indices, _ = retrieve(*query, 3, gallery, labels)
    assert labels[indices[0]].tolist() == ([1, 0, 2] if steps <= 1 else [0, 1, 2])
    assert evaluate(*query, gallery, labels, ks=(1,))["recall_at_1"] == 100 * (steps > 1)


@pytest.mark.parametrize("spread", [3e-4, 1e-3, 2e-3, 1e-2])
def test_first_neighbours_are_those_of_recall_at_1_among_nearly_collapsed_embeddings(spread):
    """From nearly all tied to hardly any."""
    embeddings, labels = make_data(7, n=400)
    embeddings = 1 + spread * embeddings.double()
    right = labels[retrieve(embeddings, labels, 1)[0][:, 0]] == labels
    assert 100 * right.double().mean() == pytest.approx(evaluate(embeddings, labels)["recall_at_1"], abs=1e-10)


def test_retrieve_puts_lower_index_first_among_equals():
    """The third vector points the same way as the first, at a length that float32 rounds."""
    gallery = torch.tensor([[0.1, 0.7], [1.0, 0.0], [0.3, 2.1], [0.1, 0.7]]).repeat(30, 1)
    same = torch.zeros(120)
    indices, _ = retrieve(torch.tensor([[0.1, 0.7]]), torch.zeros(1), 90, gallery, same)
    assert indices[0].tolist() == [i for i in range(120) if i % 4 != 1]
    indices, _ = retrieve(torch.tensor([[0.1, 0.7]]), torch.zeros(1), 90, gallery, same + torch.arange(120) % 2)
    assert indices[0].tolist() == [*range(3, 120, 4), *range(0, 120, 2)]


def test_retrieve_returns_all_others_where_they_are_fewer():
    indices, similarities = retrieve(torch.eye(3), torch.arange(3), 8)
    assert indices.tolist() == [[1, 2], [0, 2], [0, 1]] and similarities.shape == (3, 2)
    assert retrieve(torch.eye(3), torch.arange(3), 8, torch.eye(3)[:2], torch.arange(2))[0].shape == (3, 2)


def test_autocast_does_not_coarsen_the_ranking():
    embeddings, labels = make_data(0, n=300)
    expected, neighbours = evaluate(embeddings, labels), retrieve(embeddings, labels, 20)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate(embeddings, labels) == expected
        assert torch.equal(retrieve(embeddings, labels, 20)[0], neighbours)


def test_memory_is_bounded():
    embeddings, labels = make_data(0, n=1500, d=4)
    with LargestTensor() as largest:
        evaluate(embeddings, labels, block=20_000)
    assert embeddings.numel() < largest.elements <= 20_000
    with LargestTensor() as largest:
        retrieve(embeddings, labels, 8, block=20_000)
        retrieve(embeddings, labels, 8, embeddings, labels, block=20_000)
    assert embeddings.numel() < largest.elements <= 20_000
    for search in (lambda: evaluate(embeddings, labels), lambda: retrieve(embeddings, labels, 8)):
        with LargestTensor() as largest:
            search()
        assert largest.elements >= 1500 * 188  # one block, an eighth of the gallery at a time: they are seen


def test_memory_is_bounded_where_the_whole_gallery_is_searched():
    embeddings, labels = 1 + 1e-6 * torch.randn(1500, 4), torch.arange(1500) % 2
    with LargestTensor() as largest:
        evaluate(embeddings, labels, block=20_000)
        retrieve(embeddings, labels, 8, block=20_000)
    assert largest.elements <= 20_000


def test_nmi():
    embeddings = torch.eye(4).repeat_interleave(5, dim=0) + 0.01 * torch.rand(20, 4)
    labels = torch.arange(4).repeat_interleave(5)
    assert evaluate(embeddings, labels, nmi=True)["nmi"] == pytest.approx(100)
    assert "nmi" not in evaluate(embeddings, labels)

    # Two tight bundles cut across by the labels: class 0 fills one and half of the other.
    bundles = np.repeat([0, 1], 10)
    labels = torch.tensor([0] * 15 + [1] * 5)
    embeddings = torch.eye(2)[bundles] + 0.01 * torch.rand(20, 2)
    p = np.histogram2d(labels.numpy(), bundles, bins=2)[0] / 20

    def entropy(q):
        return -sum(x * math.log(x) for x in q.ravel() if x)

    h_labels, h_clusters = entropy(p.sum(1)), entropy(p.sum(0))
    expected = 2 * (h_labels + h_clusters - entropy(p)) / (h_labels + h_clusters)
    assert evaluate(embeddings, labels, nmi=True)["nmi"] == pytest.approx(100 * expected)


def test_nmi_does_not_depend_on_classes_being_in_order():
    embeddings, labels = make_data(0)
    names = labels.unique().flip(0)[labels]
    assert evaluate(embeddings, names, nmi=True)["nmi"] == pytest.approx(evaluate(embeddings, labels, nmi=True)["nmi"])


def test_nmi_is_for_sets_on_which_k_means_takes_seconds():
    assert affords_nmi(torch.arange(5924) % 100)  # CUB-200-2011
    assert not affords_nmi(torch.arange(60_502) % 11_316)  # SOP
    assert affords_nmi(torch.arange(60_000) % 10)


def test_nmi_of_equal_embeddings_is_zero():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert evaluate(torch.ones(20, 3), torch.arange(20) % 4, nmi=True)["nmi"] == 0


def test_nmi_is_repeatable():
    embeddings, labels = make_data(0)
    assert evaluate(embeddings, labels, nmi=True)["nmi"] == evaluate(embeddings, labels, nmi=True)["nmi"]


ONES, LABELS = torch.ones(4, 2), torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_not_finite(value, dtype):
    bad = ONES.to(dtype).clone()
    bad[2, 1] = value
    for call in (
        lambda: evaluate(bad, LABELS),
        lambda: evaluate(ONES, LABELS, bad, LABELS),
        lambda: retrieve(bad, LABELS, 1),
        lambda: retrieve(ONES, LABELS, 1, bad, LABELS),
    ):
        with pytest.raises(UserError, match="embedding of image 2 is not finite"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate(torch.empty(0, 2), torch.empty(0)), r"embeddings: shape \(0, 2\)"),
        (lambda: evaluate(ONES, LABELS, torch.empty(0, 2), torch.empty(0)), r"gallery: shape \(0, 2\)"),
        (lambda: evaluate(ONES[0], LABELS), r"embeddings: shape \(2,\)"),
        (lambda: evaluate(ONES, LABELS[:3]), r"labels: shape \(3,\).* \(4,\)"),
        (lambda: evaluate(ONES, LABELS, ONES, LABELS[:1]), r"gallery_labels: shape \(1,\).* \(4,\)"),
        (lambda: evaluate(ONES, LABELS, torch.ones(4, 3), LABELS), "gallery: embeddings have 3 dimensions.* 2;"),
        (lambda: evaluate(ONES, LABELS, ONES), "gallery: .* only together"),
        (lambda: evaluate(ONES, LABELS, ONES, LABELS, nmi=True), "nmi: allowed only without a gallery"),
        (lambda: evaluate(ONES, LABELS, ks=(0, 1)), r"ks: \[0, 1\]"),
        (lambda: evaluate(ONES, torch.arange(4)), "labels: no query has another image of its class"),
        (lambda: evaluate(ONES[:1], LABELS[:1]), "labels: no query has another image of its class"),
        (lambda: retrieve(torch.empty(0, 2), torch.empty(0), 1), r"queries: shape \(0, 2\)"),
        (lambda: retrieve(ONES, LABELS, 1, torch.empty(0, 2), torch.empty(0)), r"gallery: shape \(0, 2\)"),
        (lambda: retrieve(ONES, LABELS, 1, torch.ones(4, 3), LABELS), "gallery: embeddings have 3 dimensions.* 2;"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_recall_at_k_is_that_of_evaluate_by_k():
    embeddings, labels = clusters(6, 5, noise=1.5)
    metrics = evaluate(embeddings, labels, ks=(1, 3))
    assert recall_at_k(embeddings, labels, ks=(1, 3)) == {1: metrics["recall_at_1"], 3: metrics["recall_at_3"]}
    assert 0 < metrics["recall_at_1"] < metrics["recall_at_3"] < 100
    gallery, others = embeddings[::2], labels[::2]
    expected = evaluate(embeddings, labels, gallery, others, ks=(2,))["recall_at_2"]
    assert recall_at_k(embeddings, labels, gallery, others, ks=(2,)) == {2: expected}
    assert recall_at_k(torch.ones(8, 3), torch.arange(8) // 2, ks=(1, 4)) == {1: 0, 4: 0}  # six of other classes
    with pytest.raises(UserError, match="ks: .* at least 1"):
        recall_at_k(embeddings, labels, ks=(0,))
