"""The losses of the methods that compare views, written out from their papers, and what the parts promise."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Mask
from vidssl.objective import agreement
from vidssl.objective.agreement import ViewAgreement
from vidssl.objective.embedding_losses import random_directions
from vidssl.objective.global_batch import GlobalBatchNorm

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import small

CLIPS = 4
Embeddings = list[Tensor]  # [B, K] of each view


def mlp(layers: nn.Sequential, x: Tensor) -> Tensor:
    """The layers of a projector, with torch's own batch norm."""
    for layer in layers:
        if isinstance(layer, GlobalBatchNorm):
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
        else:
            x = layer(x)
    return x


class Longhand:
    """A tiny method on drawn views, and the embeddings of its branches, one view and clip set at a time."""

    def __init__(self, method: str, monkeypatch: pytest.MonkeyPatch):
        # SimCLR's tiny sizes have a milder temperature than the paper
        published = ["method.agree.agreement.temperature=0.1"] if method == "simclr" else []
        cfg = small(method, *published)
        self.objective: ViewAgreement = cfg.build_objective()
        self.video = torch.zeros(CLIPS, 3, cfg.data.frames, 32, 32)
        torch.manual_seed(1)
        views = [
            torch.randn(CLIPS, 3, cfg.data.frames, v.size or 32, v.size or 32) for v in self.objective.views
        ]
        monkeypatch.setattr(agreement, "cut_view", lambda video, group, rng, index: views[index])
        with torch.no_grad():  # averages that differ from what they are averages of; a centre that has moved
            for name, p in self.objective.named_parameters():
                if name.startswith("average."):
                    p.add_(0.1 * torch.randn_like(p))
            if hasattr(self.objective.loss, "centre"):
                self.objective.loss.centre.normal_()
        self.masks = self.objective.draw_masks(self.video.shape, KeyedRNG(0, 2, torch.arange(CLIPS)))
        kept = dict(zip(self.objective.masked, self.masks or [], strict=True))
        classes = [self.objective.encoder(v, kept[i].context if i in kept else None, return_levels=True)[:, 0]
                   for i, v in enumerate(views)]  # fmt: skip
        online = [classes[i] for i in self.objective.online]
        self.z = self.project(self.objective.projector, online)
        self.p = self.project(self.objective.predictor, self.z)
        average = self.objective.average
        if self.objective.branch == "ema":
            whole = [average.encoder(views[i], return_levels=True)[:, 0] for i in self.objective.targets]
            self.target = self.project(average.others[0], whole)

    def project(self, layers: nn.Sequential, views: Embeddings) -> Embeddings:
        if layers.join_views:
            return list(mlp(layers, torch.cat(views)).chunk(len(views)))
        return [mlp(layers, view) for view in views]

    def cosines(self, views: Embeddings, averaged: bool = False) -> Embeddings:
        module = self.objective.average.others[1] if averaged else self.objective.prototypes
        return [F.cosine_similarity(v[:, None], module.weight[None], dim=-1) for v in views]


def sigreg_longhand(views: Embeddings, directions: int) -> Tensor:
    """LeJEPA, section 4: n * integral of |empirical - normal characteristic function|^2 times the density's
    exponential, for each direction, over -3..3."""
    a = random_directions(KeyedRNG(0, 2, torch.arange(CLIPS)), views[0].shape[1], directions)
    t = torch.linspace(-3, 3, 33)
    found = []
    for x in views:
        phi = torch.exp(1j * (x @ a)[:, :, None] * t).mean(0)
        gap = (phi - torch.exp(-t.square() / 2)).abs().square() * torch.exp(-t.square() / 2)
        found.append(len(x) * torch.trapezoid(gap, t).mean())
    return sum(found) / len(found)


def levjepa(m: Longhand) -> Tensor:
    distances = [(m.z[0] - z).square().mean() for z in m.z]
    return sum(distances) / len(distances) + 0.02 * sigreg_longhand(m.z, 1024)


def lejepa(m: Longhand) -> Tensor:
    centre = (m.z[0] + m.z[1]) / 2
    distances = [(centre - z).square().mean() for z in m.z]
    return 0.95 * sum(distances) / len(distances) + 0.05 * sigreg_longhand(m.z, 256)


def vicreg(m: Longhand) -> Tensor:
    a, b = m.z
    variance = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() / 2 for z in (a, b))
    covariance = 0.0
    for z in (a, b):
        c = torch.cov(z.T)
        covariance = covariance + (c.square().sum() - c.diag().square().sum()) / z.shape[1]
    return 25 * (a - b).square().mean() + 25 * variance + covariance


def simclr(m: Longhand) -> Tensor:
    z = torch.cat(m.z)
    n = len(z)
    total = 0.0
    for i in range(n):
        s = torch.stack([F.cosine_similarity(z[i], z[k], dim=0) / 0.1 for k in range(n)])
        others = [k for k in range(n) if k != i]
        total = total - s[(i + CLIPS) % n] + s[others].exp().sum().log()
    return total / n


def moco_v3(m: Longhand) -> Tensor:
    def contrast(q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.2
        return 2 * 0.2 * F.cross_entropy(logits, torch.arange(CLIPS))

    return contrast(m.p[0], m.target[1]) + contrast(m.p[1], m.target[0])


def byol(m: Longhand) -> Tensor:
    pairs = ((m.p[0], m.target[1]), (m.p[1], m.target[0]))
    return sum((F.normalize(p, dim=1) - F.normalize(t, dim=1)).square().sum(1).mean() for p, t in pairs)


def simsiam(m: Longhand) -> Tensor:
    pairs = ((m.p[0], m.z[1]), (m.p[1], m.z[0]))
    return 1 - sum(F.cosine_similarity(p, z.detach(), dim=1).mean() for p, z in pairs) / 2


def even(q: Tensor) -> Tensor:
    """Three rounds of Sinkhorn and Knopp: columns, then rows."""
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q.detach()


def cross_entropy(cosines: Tensor, q: Tensor) -> Tensor:
    return -(q.detach() * (cosines / 0.1).softmax(1).log()).sum(1).mean()


def swav(m: Longhand) -> Tensor:
    a, b = m.cosines(m.z)
    return (cross_entropy(a, even((b / 0.05).exp())) + cross_entropy(b, even((a / 0.05).exp()))) / 2


def dino(m: Longhand) -> Tensor:
    temperature = 0.04 + 2 / 3 * 0.03  # step 2 of 3 of the warm-up
    q = [((t - m.objective.loss.centre) / temperature).softmax(1) for t in m.cosines(m.target, True)]
    found = [cross_entropy(c, q[j]) for j in range(2) for i, c in enumerate(m.cosines(m.z)) if i != j]
    assert len(found) == 6
    return sum(found) / 6


def msn(m: Longhand) -> Tensor:
    q = (m.cosines(m.target)[0] / 0.1).softmax(1) ** 4
    anchors = m.cosines(m.z)
    mean = torch.cat([(c / 0.1).softmax(1) for c in anchors]).mean(0)
    entropy = -(mean * mean.log()).sum()
    found = [cross_entropy(c, even(q / q.sum(1, keepdim=True))) for c in anchors]
    return sum(found) / len(found) + torch.tensor(float(len(mean))).log() - entropy


PAPERS: dict[str, Callable[[Longhand], Tensor]] = {
    f.__name__: f for f in (levjepa, lejepa, vicreg, simclr, moco_v3, byol, simsiam, swav, dino, msn)
}


@pytest.mark.parametrize("method", PAPERS)
def test_the_loss_and_its_gradients_are_those_of_the_paper(method, monkeypatch):
    m = Longhand(method, monkeypatch)
    ours = m.objective(m.video, KeyedRNG(0, 2, torch.arange(CLIPS)), m.masks)["loss"]
    want = PAPERS[method](m)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    weights = [p for n, p in m.objective.named_parameters() if p.requires_grad and n != "encoder.norm.bias"]
    gradients = torch.autograd.grad(ours, weights)
    largest = max(g.abs().max() for g in gradients)
    for a, b in zip(gradients, torch.autograd.grad(want, weights), strict=True):
        assert (a - b).abs().max() < 1e-4 * max(b.abs().max(), 1e-3 * largest)


def test_ibot(monkeypatch):
    """Section 3.2: class tokens of the other views, and hidden patches of the same view, both from the masked
    views, through one head; the loss of a patch is a mean over the hidden ones of a view."""
    objective = small("ibot").build_objective()
    rng = KeyedRNG(0, 2, torch.arange(CLIPS))
    torch.manual_seed(1)
    views = [torch.randn(CLIPS, 3, 1, size, size) for size in (24, 24, 16, 16)]
    monkeypatch.setattr(agreement, "cut_view", lambda video, group, rng, index: views[index])
    head, average = objective.projector, objective.average
    with torch.no_grad():
        for name, p in objective.named_parameters():
            if name.startswith("average."):
                p.add_(0.1 * torch.randn_like(p))
        objective.loss.centre.normal_(std=0.1)
        objective.patches.clusters.centre.normal_(std=0.1)
    before = objective.patches.clusters.centre.clone()
    video = torch.zeros(CLIPS, 3, 1, 32, 32)
    masks = objective.draw_masks(video.shape, rng)
    assert len(masks) == 2 and masks[0].target.shape == (CLIPS, 1, 3)
    ours = objective(video, rng, masks)["loss"]

    def name(tokens: Tensor, network: nn.Sequential, prototypes: Tensor) -> Tensor:
        return F.normalize(mlp(network, tokens), dim=-1) @ F.normalize(prototypes, dim=-1).T

    student, teacher = [], []
    for i, view in enumerate(views):
        encoder = objective.encoder
        patches = view.reshape(CLIPS, 3, view.shape[-1] // 8, 8, view.shape[-1] // 8, 8)
        x = torch.einsum("bchpwq,dcpq->bhwd", patches, encoder.patch_embed.proj.weight[:, :, 0]).flatten(1, 2)
        x = x + encoder.patch_embed.proj.bias
        if i < 2:
            hidden = torch.ones(x.shape[:2], dtype=torch.bool).scatter(1, masks[i].context, False)
            x = torch.where(hidden[..., None], objective.patches.hidden.token, x)
        x = x + encoder.positions.embedding(encoder.grid_of(view), None)
        x = torch.cat([encoder.class_token.expand(CLIPS, 1, -1), x], 1)
        for block in encoder.blocks:
            x = block(x)
        student.append(name(encoder.norm(x), head, objective.prototypes.weight))
        if i < 2:
            whole = average.encoder(view, with_class=True)
            teacher.append(name(whole, average.others[0], average.others[1].weight).detach())
    temperature = 0.04 + 2 / 3 * 0.03  # step 2 of 3 of the warm-up
    of_class, of_patches = [], []
    for q, target in enumerate(teacher):
        wanted = ((target[:, 0] - objective.loss.centre) / temperature).softmax(-1)
        for v, own in enumerate(student):
            log_p = (own / 0.1).log_softmax(-1)
            if v != q:
                of_class.append(-(wanted * log_p[:, 0]).sum(-1).mean())
                continue
            wanted_patches = ((target[:, 1:] - objective.patches.clusters.centre) / temperature).softmax(-1)
            each = -(wanted_patches * log_p[:, 1:]).sum(-1)
            hidden = masks[q].target[:, 0]
            of_patches += [each[b, hidden[b]].mean() for b in range(CLIPS)]
    want = sum(of_class) / 6 + sum(of_patches) / (2 * CLIPS)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    objective.update(0.0)  # the centre of patches is that of all of them
    rows = torch.stack([t[:, 1:] for t in teacher]).flatten(0, 2).mean(0)
    centre = objective.patches.clusters.centre
    torch.testing.assert_close(centre, 0.99 * before + 0.01 * rows)


def test_the_average_follows_the_trained_networks():
    objective = small("dino", "model.depth=1").build_objective()
    average = objective.average
    assert objective.eval_encoder is objective.ema_encoder is average.encoder
    before = [p.clone() for p in average.parameters()]
    with torch.no_grad():
        for p in objective.parameters():
            p.add_(p.requires_grad)
    average.momentum = (0.8, 1.0)
    objective.update(0.5)
    for old, new in zip(before, average.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.1)


def test_the_trained_encoder_is_evaluated_where_it_was():
    objective = small("byol", "model.depth=1").build_objective()
    assert objective.ema_encoder is not None
    assert objective.eval_encoder is objective.encoder


def test_frozen_prototypes_get_no_gradient():
    objective = small("swav", "model.depth=1", "method.agree.agreement.freeze_prototypes=1").build_objective()
    video = torch.randn(4, 3, 8, 32, 32)
    for step in range(2):
        objective.zero_grad()
        objective(video, KeyedRNG(0, step, torch.arange(4)))["loss"].backward()
        assert objective.prototypes.weight.grad.any() == (step == 1)


@pytest.mark.parametrize("windows", [1, 2])
def test_view_v_is_cut_from_window_v(windows, monkeypatch):
    """Of the stream's own number of windows: a longer clip of one window is not divided."""
    stream = f"[{{train: [x], frames: {16 // windows}, windows: {windows}, clips: 4, stride: 1}}]"
    cfg = small("simclr", "model.depth=1", "run.lanes=4", f"data.extra_streams={stream}")
    objective = cfg.build_objective()
    seen = []
    monkeypatch.setattr(
        agreement,
        "cut_view",
        lambda clip, *_: seen.append(clip[0, 0, :, 0, 0].tolist()) or clip[..., :16, :16],
    )
    video = torch.arange(16.0)[:, None, None].expand(2, 3, 16, 32, 32)
    objective(video, KeyedRNG(0, 0, torch.arange(2)))
    whole = list(range(16))
    assert seen == ([whole[:8], whole[8:]] if windows == 2 else [whole, whole])


def test_streams_of_equal_clips_have_equal_windows():
    stream = "[{train: [x], frames: 4, windows: 2, clips: 4, stride: 1}]"
    with pytest.raises(
        UserError, match="clips of 8 frames are 2 windows, in another stream 1: give one number"
    ):
        small("simclr", "model.depth=1", "run.lanes=4", f"data.extra_streams={stream}").build_objective()


@pytest.mark.parametrize(
    ("method", "change", "error"),
    [
        ("byol", "branch=same", "momentum goes with branch or evaluate ema: give both or neither"),
        ("msn", "branch=same", "role target needs branch ema, not same"),
        ("simclr", "views=[{}]", "give two or more"),
        ("simclr", "views=[{count: 2, size: 20}]", "not a multiple of model.patch 8"),
        ("simclr", "views=[{}, {role: online}]", "own_view: every view must have the role both"),
        ("simclr", "views=[{size: 16, scale: [0.5, 2]}]", "an area is at most 1"),
        ("simclr", "views=[{scales: [1, 1]}]", "unexpected keyword argument"),
        ("simclr", "agreement.temprature=0.2", "did you mean method.agree.agreement.temperature"),
        ("simclr", "agreement.kind=ncee", "no kind 'ncee'; allowed: mse, cosine, nce, cross_entropy"),
        ("simclr", "aux=[{kind: me_max}]", "me_max needs prototypes"),
        ("levjepa", "mask={kind: multiblock_3d}", "2 masks of a view"),
        ("dino", "patches={}", "patches: needs method.agree.mask"),
        ("ibot", "agreement={kind: cosine}", "patches: needs branch: ema and agreement.kind: cross_entropy"),
        ("ibot", "views=[{count: 2}, {role: online}]", "masked views must have the role both"),
        ("ibot", "projector.norm=batch", "with norm: none or layer"),
    ],
)
def test_mistakes_are_named(method, change, error):
    with pytest.raises(UserError, match=error):
        objective = small(method, f"method.agree.{change}").build_objective()
        objective(torch.zeros(2, 3, 8, 32, 32), KeyedRNG(0, 0, torch.arange(2)))


def test_a_sum_reconstructs_each_window_by_itself_and_compares_them(monkeypatch):
    """ViC-MAE: 0.97 * mean error of the frames' reconstructions + 0.03 * InfoNCE of their mean tokens."""
    objective = small("vicmae", "model.depth=1", "data.windows=2").build_objective()
    reconstruction, comparison = objective.terms
    monkeypatch.setattr(agreement, "cut_view", lambda frame, *_: frame[..., :16, :16])
    clips = 3
    video = torch.randn(clips, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    rng = KeyedRNG(0, 0, torch.arange(clips))
    masks = objective.draw_masks(video.shape, rng)
    found = objective(video, rng, masks)
    (drawn,) = masks[0]
    assert len({tuple(row) for row in drawn.context.tolist()}) == 2 * clips
    errors = 0.0
    u = []
    for i in range(2):
        frame = video[:, :, i : i + 1]
        rows = slice(i * clips, (i + 1) * clips)
        own = [Mask(drawn.context[rows], drawn.target[rows])]
        errors = errors + reconstruction(frame, rng, own)["loss"] / 2
        visible = objective.encoder(frame[..., :16, :16], masks[1][i].context, return_levels=True)[:, 1:]
        u.append(F.normalize(mlp(comparison.projector, visible.mean(1)), dim=1))
    logits = u[0] @ u[1].T / 0.1
    right = torch.arange(clips)
    contrast = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(found["loss"], 0.97 * errors + 0.03 * contrast)


def test_clips_are_compared_with_one_another_and_with_a_frame(monkeypatch):
    """0.97 * mean error of the clip's reconstruction + 0.03 * NT-Xent of the mean visible tokens of two clips
    and of a frame, each pair both ways: the wrong answers are all other clips in either of the two views."""
    objective = small("clip_frame_contrast", "model.depth=1").build_objective()
    reconstruction, comparison = objective.terms
    seen = []

    def cut(video, *_):
        seen.append(video)
        return video[..., :16, :16]

    monkeypatch.setattr(agreement, "cut_view", cut)
    video = torch.randn(CLIPS, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    rng = KeyedRNG(0, 0, torch.arange(CLIPS))
    masks = objective.draw_masks(video.shape, rng)
    loss = objective(video, rng, masks)["loss"]
    error = reconstruction(video, rng, masks[0])["loss"]
    frame = seen[2]
    assert frame.shape == (CLIPS, 3, 2, 32, 32) and frame[:, :, 0].equal(frame[:, :, 1])
    drawn = [[t for t in range(8) if frame[i, :, 0].equal(video[i, :, t])] for i in range(CLIPS)]
    assert all(len(times) == 1 for times in drawn) and len({times[0] for times in drawn}) > 1
    z = []
    for view, mask in zip((video, video, frame), masks[1], strict=True):
        visible = objective.encoder(view[..., :16, :16], mask.context, return_levels=True)[:, 1:]
        z.append(F.normalize(mlp(comparison.projector, visible.mean(1)), dim=1))
    total = 0.0
    for a, b in ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)):
        for i in range(CLIPS):
            right = (z[a][i] @ z[b][i] / 0.1).exp()
            wrong = [(z[a][i] @ z[v][j] / 0.1).exp() for v in (a, b) for j in range(CLIPS) if j != i]
            total = total - (right / (right + sum(wrong))).log() / (6 * CLIPS)
    torch.testing.assert_close(loss, 0.97 * error + 0.03 * total)


def test_two_averages_of_one_encoder_are_refused():
    average = ["method.target={kind: ema, momentum: [0.9, 1]}", "method.agree.branch=ema"]
    with pytest.raises(UserError, match="only one of them may"):
        small("vicmae", "method.agree.momentum=[0.9, 1]", *average).build_objective()
