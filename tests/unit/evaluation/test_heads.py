"""Heads, hyperparameter selection on train alone, neighbours, solvers, metrics and splits."""

import copy
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.splits import split_by_group
from vidssl.data.shards import Sample
from vidssl.evaluation import metrics
from vidssl.evaluation.evaluate import LabelledFeatures, evaluate
from vidssl.evaluation.feature_cache import FeatureShape
from vidssl.evaluation.features import StandardisedFeatures, StoredFeatures, token_statistics
from vidssl.evaluation.heads import Attentive, Linear, cross_attend_jointly
from vidssl.evaluation.neighbours import Knn, Retrieval, knn_predict
from vidssl.evaluation.processes import Processes
from vidssl.evaluation.protocol import TrainingSet, chunks, mean_pool, select_and_train
from vidssl.evaluation.solvers import ridge_regression
from vidssl.evaluation.splits import low_shot
from vidssl.evaluation.tasks import Task
from vidssl.model.heads import AttentiveHead

CPU = torch.device("cpu")
THREE = Task("x", "class", ["a", "b", "c"])


def problem(n: int = 60, clips: int = 1, width: int = 8) -> tuple[StoredFeatures, list[int]]:
    """Three classes that one channel separates."""
    torch.manual_seed(0)
    tokens = torch.randn(n, clips, 4, width)
    labels = [i % 3 for i in range(n)]
    tokens[..., 0] += 3 * torch.tensor(labels)[:, None, None]
    return StoredFeatures(tokens, CPU), labels


def training_set(source: StoredFeatures, labels: list, task: Task = THREE) -> TrainingSet:
    return TrainingSet(source, list(range(len(labels))), labels, task.label_tensor(labels, CPU))


def test_joint_heads_equal_single_heads():
    torch.manual_seed(0)
    heads = [AttentiveHead(24, 4, 5) for _ in range(3)]
    for head in heads:  # a fresh norm has neither scale nor shift to go wrong
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randn(6, 10, 24)
    alone = [copy.deepcopy(head) for head in heads]
    for head, other, logits in zip(heads, alone, cross_attend_jointly(heads, tokens), strict=True):
        torch.testing.assert_close(logits, other(tokens), atol=1e-5, rtol=1e-5)
        logits.square().mean().backward(retain_graph=True)
        other(tokens).square().mean().backward()
        for (name, a), b in zip(head.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_head_of_a_grid_equals_the_head_trained_alone(depth):
    source, labels = problem()
    protocol = Attentive(depth=depth, heads=2, epochs=3, batch=16, lr=(1e-2, 1e-3), weight_decay=(0.0, 0.5))
    data = training_set(source, labels)
    grid = protocol.hyperparameters()
    together = protocol.train(THREE, data, grid)
    assert [tuple(setting.values()) for setting in grid] == [(1e-2, 0), (1e-2, 0.5), (1e-3, 0), (1e-3, 0.5)]
    outputs = protocol.predict(together, source, data.indices, THREE)
    for setting, output in zip(grid, outputs, strict=True):
        alone = protocol.predict(protocol.train(THREE, data, [setting]), source, data.indices, THREE)[0]
        torch.testing.assert_close(output, alone, atol=1e-4, rtol=1e-3)
    assert (outputs[0] - outputs[2]).abs().max() > 0.01


def test_selection_uses_only_train():
    """Held-out scores are counts over the held-out part, and a learning rate that learns is selected."""
    source, labels = problem()
    protocol = Attentive(heads=2, epochs=10, batch=16, lr=(1e-2, 1e-9))
    probe = select_and_train(protocol, THREE, training_set(source, labels), [str(i) for i in range(60)])
    selection = probe.selection
    assert selection["lr"] == 1e-2 and selection["n_held_out"] == 12
    scores = [t["held_out_accuracy"] for t in selection["tried"]]
    assert all(round(s * 12 / 100) == pytest.approx(s * 12 / 100, abs=0.01) for s in scores)
    assert scores[0] > scores[1]


class RecordingFeatures(StoredFeatures):
    """Records the requested batches."""

    def batches(self, per: int, lists: list[list[int]]) -> Iterator[Tensor]:
        for numbers, tokens in zip(lists, super().batches(per, lists), strict=True):
            self.asked.append(set(numbers))
            yield tokens


def test_groups_are_held_out_as_a_whole_in_selection():
    """Features that name their group and labels that are one per group: a head that had seen a held-out
    group's other clips would know it. Held out by group the choice is at chance; held out clip by clip (the
    leak) it looks perfect."""
    torch.manual_seed(0)
    names = torch.randn(40, 1, 32).repeat_interleave(5, 0)  # 40 groups of 5 clips that look the same
    labels = np.random.default_rng(0).integers(3, size=40).repeat(5).tolist()
    groups = [f"g{i // 5}" for i in range(200)]
    source = RecordingFeatures((4 * names + 0.1 * torch.randn(200, 1, 32))[:, None], CPU)
    source.asked = []
    protocol = Linear(l2=(1e-3, 1e-2), standardise=False)
    honest = select_and_train(protocol, THREE, training_set(source, labels), groups).selection
    first = source.asked[0]
    split = split_by_group(groups, [(c,) for c in labels], 0.2, 0)
    seen = set(np.flatnonzero(split.held_out).tolist())
    assert not first & seen and first | seen == set(range(200))
    single = [str(i) for i in range(200)]
    leaky = select_and_train(protocol, THREE, training_set(source, labels), single).selection
    assert max(t["held_out_accuracy"] for t in honest["tried"]) < 70
    assert min(t["held_out_accuracy"] for t in leaky["tried"]) > 95


def test_one_group_cannot_be_split():
    source, labels = problem(12)
    with pytest.raises(UserError, match="no group of train can be held out"):
        select_and_train(
            Attentive(heads=2, lr=(1e-2, 1e-3)), THREE, training_set(source, labels), ["one"] * 12
        )


def test_statistics_are_on_the_device_of_the_tokens_also_without_examples():
    """A process has none of a low-shot list that is shorter than the processes are many."""
    device = torch.device("meta")
    source = StoredFeatures(torch.zeros(9, 1, 3, 4), device, Processes(device=device))
    assert {statistic.device for statistic in token_statistics(source, 1, [])} == {device}


def test_standardised_tokens():
    torch.manual_seed(0)
    tokens = torch.randn(50, 1, 3, 4) * torch.tensor([1.0, 10, 0.1, 5]) + 100 * torch.randn(3, 4)
    source = StoredFeatures(tokens, CPU)
    mean, deviation = token_statistics(source, 1, chunks(list(range(50)), 7))
    torch.testing.assert_close(mean, tokens.mean((0, 1)), atol=1e-4, rtol=1e-5)
    (out,) = StandardisedFeatures(source, mean, deviation).batches(1, [list(range(50))])
    assert out.mean(0).abs().max() < 1e-3
    assert (out.square().mean((0, 1)) - 1).abs().max() < 1e-3


def test_views_are_averaged_and_temporal_bins_concatenated():
    """2 segments x 3 crops: pooled over segments a sample has 3 examples of 2 clips; else 6 of one."""
    tokens = torch.arange(5 * 6 * 4 * 2.0).view(5, 6, 4, 2)
    source = StoredFeatures(tokens, CPU)
    over = Attentive(heads=1, segments=2, crops=3)
    assert (over.examples_per_sample, over.clips_per_example(source), over.examples_of([1, 4])) == (
        3,
        2,
        [3, 4, 5, 12, 13, 14],
    )
    (example,) = source.batches(2, [[4]])
    assert torch.equal(example[0], tokens[1, 2:4].flatten(0, 1))  # sample 1, crop 1
    apart = Attentive(heads=1, segments=2, crops=3, aggregate="none")
    assert (apart.examples_per_sample, apart.clips_per_example(source)) == (6, 1)
    heads = [AttentiveHead(2, 1, 3)]
    outputs = over.predict(heads, source, [1, 4], THREE)[0]
    longhand = torch.stack([heads[0](tokens[n].view(3, 8, 2)).softmax(-1).mean(0) for n in (1, 4)])
    torch.testing.assert_close(outputs, longhand)
    mean = mean_pool(source, [0, 3], over, 2, CPU)
    assert mean.shape == FeatureShape(5, 3, 1, 4)
    halves = (
        tokens[3, 2:4].view(2, 2, 2, 2).mean((0, 2)).flatten()
    )  # crop 1: over segments, two halves of a clip
    torch.testing.assert_close(mean.tokens[3, 1, 0], halves)


def test_logistic_regression_is_at_its_minimum():
    source, labels = problem(clips=2)
    protocol = Linear(aggregate="none", segments=2, l2=(0.01, 1.0))
    seen = protocol.prepare(source, list(range(60)), CPU)
    heads = protocol.train(THREE, training_set(seen, labels), protocol.hyperparameters())
    x = source.tokens.mean(2).flatten(0, 1)
    y = torch.tensor(labels).repeat_interleave(2)
    for head, l2 in zip(heads, (0.01, 1.0), strict=True):
        weight = head.linear.weight.detach().clone().requires_grad_()
        loss = torch.nn.functional.cross_entropy(x @ weight.T + head.linear.bias.detach(), y)
        (gradient,) = torch.autograd.grad(loss + l2 / 2 * weight.square().sum(), weight)
        assert gradient.abs().max() < 1e-4 and weight.abs().max() > 0.05
    assert heads[0].linear.weight.norm() > 2 * heads[1].linear.weight.norm()


def test_adamw_learns():
    source, labels = problem(clips=1)
    seen = Linear().prepare(source, list(range(60)), CPU)
    protocol = Linear(solver="adamw", lr=(0.3, 1e-6), epochs=40, batch=20)
    model, apply_standardisation, selection, _ = select_and_train(
        protocol, THREE, training_set(seen, labels), [str(i) for i in range(60)]
    )
    output = protocol.predict([model], apply_standardisation(seen), list(range(60)), THREE)[0]
    assert selection["lr"] == 0.3 and (output.argmax(1) == torch.tensor(labels)).float().mean() > 0.95


def test_knn_equals_a_loop():
    source, labels = problem(30)
    protocol = Knn(k=(3, 50), temperature=0.2)
    seen = protocol.prepare(source, list(range(30)), CPU)
    train = TrainingSet(seen, list(range(20)), labels[:20], torch.tensor(labels[:20]))
    votes = protocol.predict(
        protocol.train(THREE, train, protocol.hyperparameters()), seen, list(range(20, 30)), THREE
    )
    keys = torch.nn.functional.normalize(source.tokens.mean((1, 2)), dim=-1)
    for q in range(20, 30):
        cosine = (keys[:20] @ keys[q]).tolist()
        for g, k in enumerate((3, 20)):  # 50 of 20 are all
            near = sorted(range(20), key=lambda i: -cosine[i])[:k]
            want = torch.zeros(3)
            for i in near:
                want[labels[i]] += np.exp(cosine[i] / 0.2)
            torch.testing.assert_close(votes[g, q - 20], want / want.sum(), atol=1e-5, rtol=1e-4)


def test_retrieval_metrics_by_hand():
    keys = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [1, 0.05], [0.1, 1]])  # 3 in train, 2 ask
    protocol = Retrieval()
    task = Task("x", "class", ["a", "b"])
    source = protocol.prepare(StoredFeatures(keys[:, None, None], CPU), list(range(5)), CPU)
    train = TrainingSet(source, [0, 1, 2], [0, 1, 1], torch.tensor([0, 1, 1]))
    (model,) = protocol.train(task, train, protocol.hyperparameters())
    assert protocol.predict([model], source, [3, 4], task)[0].tolist() == [[1, 0], [0, 1]]
    extra = protocol.extra_metrics(model, source, [3, 4], task, [1, 1])  # 3 finds a, b, b; 4 finds b, b, a
    assert extra == {
        "recall_at_5": 100,
        "retrieval_mAP": pytest.approx(100 * ((1 / 2 + 2 / 3) / 2 + 1) / 2, abs=1e-3),
    }


def test_metrics_by_hand():
    output = np.array([[0.1, 0.6, 0.3], [0.5, 0.5, 0.0], [0.2, 0.2, 0.6]])
    truth = np.array([1, 1, 0])
    assert metrics.true_class_rank(output, truth).tolist() == [
        0,
        1,
        1,
    ]  # of equal ones the first class stands first
    assert metrics.mean_per_class(
        np.array([True, False, False, True]), np.array([0, 0, 0, 1])
    ) == pytest.approx(66.6667)
    assert metrics.average_precision(
        np.array([0.9, 0.8, 0.7]), np.array([True, False, True])
    ) == pytest.approx(5 / 6)
    assert metrics.average_precision(np.zeros(4), np.array([True, False, False, False])) == pytest.approx(
        1 / 4
    )
    assert metrics.r2(np.array([1.0, 2, 3]), np.array([1.0, 2, 3])) == 1
    assert metrics.r2(np.array([2.0, 2, 2]), np.array([1.0, 2, 3])) == 0


def test_tags_and_numbers_are_learned():
    source, _ = problem()
    values = source.tokens[:, 0, :, 0].mean(1)
    number = Task("x", "number", ["x"])
    tags = Task("x", "tags", ["high", "low", "any"])
    lists = [[0, 2] if v > 3 else [1, 2] if v < 2 else [2] for v in values.tolist()]
    groups = [str(i) for i in range(60)]
    protocol = Linear(l2=(1e-4, 1e4))
    for task, labels, least in ((number, values.tolist(), 0.99), (tags, lists, 98)):
        seen = protocol.prepare(source, list(range(60)), CPU)
        model, apply_standardisation, selection, task = select_and_train(
            protocol, task, training_set(seen, labels, task), groups
        )
        output = (
            protocol.predict([model], apply_standardisation(seen), list(range(60)), task)[0].double().numpy()
        )
        figures = task.test_metrics(output, labels, groups, 0)
        assert figures["value"] >= least and selection["l2"] == 1e-4
        output[:10] = np.nan  # not read: worse, and never an error
        assert task.test_metrics(output, labels, groups, 0)["value"] < figures["value"]
    assert (
        tags.format_label([0, 2]) == "high|any"
        and tags.format_prediction(np.array([0.9, 0.1, 0.8])) == "high|any"
    )


def test_low_shot_lists_are_balanced_nested_and_keyed():
    labels = [0] * 40 + [1] * 20 + [2] * 3 + [None] * 5
    keys = [f"k{i}" for i in range(68)]
    small, large = (low_shot(THREE, keys, labels, share, 0) for share in (0.1, 0.5))
    assert [sum(labels[i] == c for i in small) for c in range(3)] == [2, 2, 2]
    assert [sum(labels[i] == c for i in large) for c in range(3)] == [
        10,
        10,
        3,
    ]  # a small class gives all it has
    assert set(small) <= set(large) and small != low_shot(THREE, keys, labels, 0.1, 1)
    order = np.random.default_rng(0).permutation(68).tolist()
    again = low_shot(THREE, [keys[i] for i in order], [labels[i] for i in order], 0.1, 0)
    assert {keys[order[i]] for i in again} == {keys[i] for i in small}


KINDS = {
    "class": (THREE, lambda rng, n: rng.integers(3, size=n).tolist()),
    "tags": (
        Task("x", "tags", ["a", "b", "c"]),
        lambda rng, n: [np.flatnonzero(t).tolist() for t in rng.random((n, 3)) < 0.5],
    ),
    "number": (Task("x", "number", ["x"]), lambda rng, n: rng.normal(size=n).tolist()),
}
LOW_SHOT_PROTOCOLS = (
    Attentive(heads=2, epochs=2, lr=(1e-2, 1e-3), standardise=True),
    Linear(l2=(1e-2, 1.0)),
    Linear(solver="adamw", epochs=2, lr=(1e-2, 1e-3), temporal_bins=2),
    Knn(k=(1, 5), standardise=True),
    Retrieval(),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", LOW_SHOT_PROTOCOLS, ids=lambda p: type(p).__name__)
def test_samples_outside_a_low_shot_subset_have_no_part_in_its_figures(protocol, kind):
    """Their features, their labels and even their number may change."""
    task, draw = KINDS[kind]
    rng = np.random.default_rng(0)
    tokens = torch.randn(60, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    labels = draw(rng, 60)
    samples = [Sample(f"k{i}", "mp4", 0, 0, i, {}) for i in range(60)]
    subset = list(range(0, 40, 2))
    test_rows = list(range(40, 60))

    def row(all_tokens: Tensor, all_labels: list, n: int) -> dict:
        parts = []
        for rows in (list(range(n)), test_rows):
            source = StoredFeatures(all_tokens[rows], CPU)
            source = protocol.prepare(source, list(range(len(rows))), CPU)
            chosen = [samples[i] for i in rows]
            parts.append(LabelledFeatures(source, chosen, [all_labels[i] for i in rows], {}))
        known = [i for i in subset if i < n]
        return evaluate(protocol, task, *parts, known, CPU)[0]

    expected = row(tokens, labels, 40)
    others = [i for i in range(40) if i not in subset]
    changed_tokens = tokens.clone()
    changed_tokens[others] = 1e3 * changed_tokens[others] + 1e4
    changed_labels = list(labels)
    for i in others:
        changed_labels[i] = {"class": 0, "tags": [0], "number": 1e6 + i}[kind]
    assert row(changed_tokens, changed_labels, 40) == expected
    assert row(tokens, labels, 39) == expected


def test_settings_are_compared_without_statistics_of_held_out_train():
    """Numbers and features are standardised by what the compared heads are trained on."""
    groups = [str(i) for i in range(60)]
    held_out = split_by_group(groups, [()] * 60, 0.2, 0).held_out
    tokens = torch.randn(60, 1, 1, 4)
    labels = tokens[:, 0, 0, 0].tolist()
    fitted: list[Task] = []

    class Recording(Linear):
        def train(self, task, data, settings):
            fitted.append(task)
            return super().train(task, data, settings)

    source = StoredFeatures(tokens, CPU)
    probe = select_and_train(
        Recording(l2=(1e-3, 1.0)),
        Task("x", "number", ["x"]),
        TrainingSet(source, list(range(60)), labels, tokens),
        groups,
    )
    parts = [np.array(labels)[~held_out], np.array(labels)]
    assert [task.mean for task in fitted] == pytest.approx([part.mean() for part in parts])
    assert [task.std for task in fitted] == pytest.approx([part.std() for part in parts])
    assert probe.task == fitted[1]


def test_chance_counts_the_classes_of_train():
    """A class list may name classes that these data do not have."""
    task = Task("x", "class", [f"c{i}" for i in range(100)]).fitted([3, 7, 7, 9])
    assert task.test_metrics(np.eye(100)[[3, 7]], [3, 7], ["a", "b"], 0)["chance"] == 33.33


@pytest.mark.parametrize("shape", [(50, 4), (5, 12)])
def test_ridge_regression_is_at_its_minimum(shape):
    x = torch.randn(*shape, dtype=torch.float64)
    y = torch.randn(shape[0], 3, dtype=torch.float64)
    weight, bias = (v.requires_grad_() for v in ridge_regression(x, y, 0.1))
    loss = (x @ weight + bias - y).square().sum(1).mean() + 0.1 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-10


def test_knn_predict_of_one_hot_classes():
    train = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 2]])
    votes = knn_predict(train, torch.eye(2)[[0, 1, 1]], torch.tensor([[3.0, 0]]), k=[1, 3], temperature=0.1)
    weight = torch.tensor([1, 0.9 / math.hypot(0.9, 0.1), 0]).div(0.1).exp()
    torch.testing.assert_close(votes[:, 0, 0], torch.tensor([1.0, float(weight[0] / weight.sum())]))
