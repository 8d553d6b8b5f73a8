"""SCALE's set of clips: its loss written out, and videos that differ in the order of their clips alone."""

import pytest
import torch
import torch.nn.functional as F

from vidssl.core.errors import UserError
from vidssl.evaluation.clip_sets import ClipSet, ClipSetEncoder, set_loss
from vidssl.evaluation.features import StoredFeatures
from vidssl.evaluation.neighbours import Knn
from vidssl.evaluation.protocol import TrainingSet, mean_pool

CPU = torch.device("cpu")


def test_the_loss_written_out():
    torch.manual_seed(0)
    model = ClipSetEncoder(5, 16, 1, 2).eval()
    sets = torch.randn(2, 3, 2, 5)
    places = torch.rand(2, 3, 2, 2)
    hidden = torch.zeros(2, 3, 2, dtype=torch.bool)
    hidden[:, :, 1] = True
    outputs = [model(sets[s], places[s], hidden[s]) for s in range(2)]
    a, b = (F.normalize(model.set_head(tokens), dim=-1) for tokens, _ in outputs)
    want = 0.0
    for i in range(3):
        for x, y in ((a, b), (b, a)):
            scores = torch.stack([x[i] @ y[j] / 0.2 for j in range(3)])
            want += (scores.logsumexp(0) - scores[i]) / 6
    everything = [sets[s, i, v] / sets[s, i, v].norm() for s in range(2) for i in range(3) for v in range(2)]
    for s in range(2):
        for i in range(3):
            predicted = F.normalize(model.clip_head(outputs[s][1][i, 1]), dim=-1)
            scores = torch.stack([predicted @ feature / 0.2 for feature in everything])
            want += (scores.logsumexp(0) - scores[6 * s + 2 * i + 1]) / 6
    assert torch.allclose(set_loss(model, sets, places, hidden, 0.2), want, atol=1e-5)


def test_a_hidden_clip_is_predicted_from_the_others_alone():
    torch.manual_seed(0)
    model = ClipSetEncoder(5, 16, 1, 2).eval()
    x = torch.randn(2, 4, 5)
    hidden = torch.tensor([[False, True, False, False]]).expand(2, -1)
    other = x.clone()
    other[:, 1] += 1
    places = ClipSet(segments=4).places(CPU).expand(2, -1, -1)
    assert all(
        a.equal(b) for a, b in zip(model(x, places, hidden), model(other, places, hidden), strict=True)
    )
    assert not model(x, places)[0].equal(model(other, places)[0])


def test_places_are_those_of_the_clips():
    """Crop by crop, the segments of a crop in order."""
    assert ClipSet(segments=3, crops=2).places(CPU).tolist() == [
        [0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 1.0], [1.0, 1.0],
    ]  # fmt: skip


def test_the_order_of_clips_is_found_where_their_mean_has_none_of_it():
    generator = torch.Generator().manual_seed(0)
    n, clips, width = 96, 8, 16
    falls = torch.arange(n) % 2
    speed = 0.8 + torch.rand(n, 1, generator=generator)
    way = speed * torch.linspace(-1, 1, clips) * (1 - 2 * falls)[:, None]
    directions = torch.randn(2, width, generator=generator)
    x = torch.cos(3 * way)[..., None] * directions[0] + torch.sin(3 * way)[..., None] * directions[1]
    x = x + 0.1 * torch.randn(n, clips, width, generator=generator)
    labels = falls.tolist()
    source = StoredFeatures(x[:, :, None], CPU)
    train = list(range(64))
    test = list(range(64, n))

    def accuracy(protocol) -> float:
        pooled = mean_pool(source, train + test, protocol, 1, CPU)
        task = OneHot()
        data = TrainingSet(pooled, train, labels[:64], torch.tensor(labels[:64]))
        models = protocol.train(task, data, [{"k": 5}])
        predicted = protocol.predict(models, pooled, test, task)[0].argmax(1)
        return float((predicted == falls[64:]).float().mean())

    of_means = accuracy(Knn(segments=clips))
    of_sets = accuracy(ClipSet(segments=clips, width=32, heads=4, epochs=100, batch=32, lr=3e-3))
    assert of_means < 0.65 and of_sets > 0.85


class OneHot:
    @staticmethod
    def soft_targets(labels):
        return F.one_hot(labels, 2).float()


@pytest.mark.parametrize(
    "settings, words",
    [({"segments": 3}, "two sets of two need four clips"), ({"segments": 4, "width": 30}, "does not divide")],
)
def test_what_cannot_be_is_an_error(settings, words):
    with pytest.raises(UserError, match=words):
        ClipSet(**settings)
