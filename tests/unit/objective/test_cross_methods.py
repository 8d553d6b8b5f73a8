"""The losses of methods written out from their papers, for a small model of each method's file."""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Mask
from vidssl.model.predictor import ParallelPredictor
from vidssl.model.vit import Encoder
from vidssl.objective.embedding_losses import random_directions
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.teachers import Teachers
from vidssl.pretrained.load import load_teacher
from vidssl.training.checkpoint import network_hashes

sys.path.append(str(Path(__file__).parents[2] / "integration"))
from test_methods import make_teacher, small

B = 2
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)


def method_and_clips(method: str, *more: str) -> tuple[MaskedPrediction, torch.Tensor]:
    """The objective of a method, its clips f32 [B, 3, T, 32, 32]."""
    cfg = small(method, *more)
    objective = cfg.build_objective()
    with torch.no_grad():  # nothing is zero, no norm is the identity
        for i, p in enumerate(objective.parameters()):
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return objective, torch.randn(B, 3, cfg.data.frames, 32, 32, generator=torch.Generator().manual_seed(0))


def masks_of(objective: MaskedPrediction, video: torch.Tensor) -> list[Mask]:
    return objective.draw_masks(video.shape, KeyedRNG(0, 0, torch.arange(B)))


def fresh() -> KeyedRNG:
    return KeyedRNG(0, 0, torch.arange(B))


def tokens_of(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """x [B, N, K] at ids [B, n], by loops."""
    return torch.stack([torch.stack([x[b, i] for i in ids[b]]) for b in range(len(ids))])


def patches_of(images: torch.Tensor) -> torch.Tensor:
    """images [B, 3, 32, 32] to [B, 16, 8 * 8 * 3]."""
    corners = [(8 * (i // 4), 8 * (i % 4)) for i in range(16)]
    return torch.stack(
        [images[:, :, y : y + 8, x : x + 8].permute(0, 2, 3, 1).flatten(1) for y, x in corners], 1
    )


def test_stop():
    """Bar et al. 2023, eq. 4-6: the query is the position plus noise through the context's embedding."""
    objective, video = method_and_clips("stop")
    (mask,) = masks_of(objective, video)
    found = objective(video, fresh(), [mask])["loss"]
    predictor = objective.predictor
    z = objective.encoder(video, mask.context)
    features = objective.target.encoder(video)
    noise = 0.25 * fresh().normal(*mask.target.shape[1:], z.shape[-1])
    table = predictor.positions.table
    losses = []
    for group in range(mask.target.shape[1]):
        ids = mask.target[:, group]
        context = predictor.embed(z) + table[mask.context]
        queries = F.linear(noise[:, group], predictor.embed.weight, predictor.embed.bias) + table[ids]
        x = torch.cat([context, queries], 1)
        for block in predictor.blocks:
            x = block(x)
        pred = predictor.proj(predictor.norm(x[:, -ids.shape[1] :]))
        target = tokens_of(F.layer_norm(features, features.shape[-1:]), ids)
        gap = (pred - target).abs()
        losses.append(torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean())
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_diffmae():
    """Wei et al. 2023, section 3: the hidden patches are denoised by attending to the visible tokens."""
    objective, video = method_and_clips("diffmae")
    (mask,) = masks_of(objective, video)
    found = objective(video, fresh(), [mask])["loss"]
    predictor = objective.predictor
    z = objective.encoder(video, mask.context, return_levels=True)
    pixels = video * STD + MEAN
    patches = patches_of(pixels[:, :, 0])
    hidden = tokens_of(patches, mask.target[:, 0])
    rng = fresh()
    t = 1 + (rng.rand(1) * 1000).long()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    share = (1 - betas).cumprod(0)[t - 1].float()[:, :, None] ** 0.8
    noise = rng.normal(1, *hidden.shape[1:])[:, 0]
    x = objective.query.embed(share.sqrt() * (2 * hidden - 1) + (1 - share).sqrt() * noise)
    x = x + predictor.positions.table[mask.target[:, 0]]
    for block in predictor.blocks:
        x = x + block.cross(block.norms["cross"](x), z)
        x = x + block.mlp(block.norms["mlp"](x))
    pred = predictor.proj(predictor.norm(x))
    torch.testing.assert_close(found, ((pred - hidden) ** 2).mean())


def even_assignments(scores: torch.Tensor, iterations: int) -> torch.Tensor:
    """Sinkhorn's algorithm on scores [rows, K], written out, with CAPI's epsilon."""
    q = scores.double().exp()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / (q.sum(1, keepdim=True) + 1e-8)
    return q.float()


@pytest.mark.parametrize("positionwise", [True, False])
def test_capi(positionwise):
    """Darcet et al. 2025, section 3: assignments by Sinkhorn, for every position apart or not, are predicted,
    and the clusters learn from them."""
    objective, video = method_and_clips("capi", f"method.target.positionwise={str(positionwise).lower()}")
    objective.eval()  # without stochastic depth
    (mask,) = masks_of(objective, video)
    found = objective(video, fresh(), [mask])
    tokens = F.normalize(objective.target.encoder(video), dim=-1)
    logits = objective.target.clusters(tokens)
    if positionwise:
        columns = [even_assignments(logits[:, i] / 0.06, 3) for i in range(logits.shape[1])]
        assigned = torch.stack(columns, 1)
    else:
        assigned = even_assignments(logits.flatten(0, 1) / 0.06, 3).reshape(logits.shape)
    assigned = assigned.detach()
    clustering = -(assigned * F.log_softmax(logits / 0.12, -1)).sum(-1).mean()
    torch.testing.assert_close(found["clustering"], clustering)
    query = objective.query.tokens[0]
    z = objective.encoder(video, mask.context)
    pred = objective.predictor(z, mask, query, objective.encoder.grid_of(video)).target[:, 0]
    chosen = tokens_of(assigned, mask.target[:, 0])
    student = -(chosen * F.log_softmax(pred / 0.12, -1)).sum(-1).mean()
    torch.testing.assert_close(found["loss"], student + clustering)
    weight = objective.target.clusters.weight
    of_student = torch.autograd.grad(found["loss_0"], weight, allow_unused=True, retain_graph=True)
    of_clustering = torch.autograd.grad(clustering, weight)
    assert of_student == (None,)
    torch.testing.assert_close(torch.autograd.grad(found["loss"], weight), of_clustering)


@pytest.mark.parametrize("method", ["siammae", "cropmae"])
def test_siammae(method):
    """Gupta et al. 2023, section 3: both frames are encoded apart, tokens of the second one attend to those
    of the first one, then to each other; the hidden ones are reconstructed."""
    objective, video = method_and_clips(method)
    encoder, predictor = (objective.encoder, objective.predictor)
    (mask,) = masks_of(objective, video)
    found = objective(video, fresh(), [mask])["loss"]
    shown = mask.context[:, 16:] - 16
    assert shown.shape[1] == 3 and torch.equal(mask.context[:, :16], torch.arange(16).expand(B, -1))
    z_first = encoder(video[:, :, :1])
    z_second = encoder(video[:, :, 1:], shown)
    table = predictor.positions.table[:16]
    queries = objective.query.tokens.expand(B, 16, -1).clone()
    for clip in range(B):
        queries[clip, shown[clip]] = predictor.embed(z_second[clip])
    x = queries + table
    memory = predictor.embed(z_first)
    for block in predictor.blocks:
        x = block.norms["cross"](x + block.cross(x, memory))
        x = block.norms["mlp"](x + block.mlp(x))
        x = block.norms["self"](x + block.own(x, x))
    pred = predictor.proj(predictor.norm(x))
    patches = patches_of(video[:, :, 1])
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    hidden = mask.target[:, 0] - 16
    error = ((pred - target) ** 2).mean(-1)
    torch.testing.assert_close(found, error.gather(1, hidden).mean())


def prediction_of(predictor, objective, video, mask, index=0):
    """[B, M, Nt, K], by the joint predictor or a part of it."""
    z = objective.encoder(video, mask.context, return_levels=True)
    query = objective.query.tokens[index % len(objective.query.tokens)]
    return predictor(z, mask, query, objective.encoder.grid_of(video)).target


def test_salt_stage2(tmp_path):
    """The features of the frozen teacher, layer-normed, behind both kinds of blocks."""
    objective, video = method_and_clips("salt_stage2", *make_teacher("salt_stage2", tmp_path))
    masks = masks_of(objective, video)
    features = F.layer_norm(objective.target.teacher(video), (64,))
    losses = []
    for i, mask in enumerate(masks):
        pred = prediction_of(objective.predictor, objective, video, mask, i)[:, 0]
        losses.append((pred - tokens_of(features, mask.target[:, 0])).abs().mean())
    assert len(losses) == 2
    torch.testing.assert_close(objective(video, fresh(), masks)["loss"], sum(losses) / 2)


def test_mvd(tmp_path):
    """Wang et al. 2022, section 3: a decoder for each teacher; the image teacher sees every second frame."""
    objective, video = method_and_clips("mvd", *make_teacher("mvd", tmp_path))
    objective.eval()  # without stochastic depth
    (mask,) = masks_of(objective, video)
    of_images, of_videos = (member.teacher for member in objective.target.members)
    frames = [of_images(video[:, :, [t]]) for t in range(0, video.shape[2], 2)]
    losses = []
    for features, predictor in zip(
        (torch.cat(frames, 1), of_videos(video)), objective.predictor.members, strict=True
    ):
        pred = prediction_of(predictor, objective, video, mask)[:, 0]
        gap = (pred - tokens_of(features, mask.target[:, 0])).abs()
        losses.append(torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean())
    torch.testing.assert_close(objective(video, fresh(), [mask])["loss"], (losses[0] + losses[1]) / 2)


def sigreg_of(x: torch.Tensor, directions: torch.Tensor, clips: int) -> torch.Tensor:
    """Epps-Pulley's statistic of x [n, K] by the trapezoidal rule over -3..3, with complex numbers."""
    t = torch.linspace(-3, 3, 33)
    found = torch.exp(1j * (x @ directions)[..., None] * t).mean(0)
    normal = torch.exp(-(t**2) / 2)
    each = torch.trapezoid((found - normal).abs() ** 2 * normal, t)
    return clips * each.mean()


def vicreg_of(x: torch.Tensor) -> torch.Tensor:
    variance = torch.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()
    centred = x - x.mean(0)
    covariance = centred.T @ centred / (len(x) - 1)
    return 25 * variance + (covariance.square().sum() - covariance.diag().square().sum()) / x.shape[1]


@pytest.mark.parametrize("method", ["jepa_sigreg", "jepa_vicreg"])
def test_jepa_without_a_teacher(method):
    """The features of the encoder itself, with gradients, and a regulariser on those that are predicted."""
    objective, video = method_and_clips(method)
    masks = masks_of(objective, video)
    found = objective(video, fresh(), masks)
    losses = []
    rng = fresh()
    for i, mask in enumerate(masks):
        target = tokens_of(objective.encoder(video), mask.target[:, 0])
        pred = prediction_of(objective.predictor, objective, video, mask, i)[:, 0]
        if method == "jepa_sigreg":
            directions = random_directions(rng, target.shape[-1], 256)
            aux = 0.05 * sigreg_of(target.flatten(0, 1), directions, B)
        else:
            aux = 0.04 * vicreg_of(target.flatten(0, 1))
        torch.testing.assert_close(found[f"aux_{objective.aux[0].kind}_{i}"], aux)
        losses.append(((pred - target) ** 2).mean() + aux)
    want = sum(losses) / len(losses)
    torch.testing.assert_close(found["loss"], want)
    weight = objective.encoder.blocks[0].mlp.fc1.weight
    gradients = [torch.autograd.grad(loss, weight)[0] for loss in (found["loss"], want)]
    torch.testing.assert_close(*gradients)
    assert objective.couples_clips


@pytest.mark.parametrize("kind", ["sigreg", "variance_covariance"])
def test_a_regulariser_of_changes(kind):
    """Of the features less their mean over the time slices of each clip, at each place."""
    aux = f"method.aux=[{{kind: {kind}, weight: 0.5, tokens: changes}}]"
    objective, video = method_and_clips("jepa_vicreg", aux)
    masks = masks_of(objective, video)
    found = objective(video, fresh(), masks)
    grid = objective.encoder.grid_of(video)
    assert grid.t > 1
    features = objective.encoder(video)
    changes = torch.empty_like(features)
    for place in range(grid.h * grid.w):
        slices = [place + t * grid.h * grid.w for t in range(grid.t)]
        changes[:, slices] = features[:, slices] - features[:, slices].mean(1, keepdim=True)
    rng = fresh()
    for i in range(len(masks)):
        if kind == "sigreg":
            want = sigreg_of(changes.flatten(0, 1), random_directions(rng, features.shape[-1], 256), B)
        else:
            want = vicreg_of(changes.flatten(0, 1))
        torch.testing.assert_close(found[f"aux_{kind}_{i}"], 0.5 * want)


def test_a_regulariser_without_gradients_is_refused():
    for aux in (
        "{kind: sigreg, weight: 1.0}",
        "{kind: variance_covariance, weight: 1.0, tokens: target}",
        "{kind: sigreg, weight: 1.0, tokens: changes}",
    ):
        with pytest.raises(UserError, match="moves nothing"):
            method_and_clips("vjepa", f"method.aux=[{aux}]")
    method_and_clips("vjepa", "method.aux=[{kind: sigreg, weight: 1.0, tokens: prediction}]")


@pytest.mark.parametrize(
    "predictor",
    [
        "{kind: parallel, width: 12, heads: 2}",
        "{kind: conv}",
        "{kind: joint, width: 36, positions: rope, class_token: none}",
    ],
)
def test_context_mean_needs_positions(predictor):
    options = ["method.query={kind: context_mean}", f"method.predictor={predictor}"]
    with pytest.raises(UserError, match="predictor joint or cross, with added positions, not rope"):
        small("mae", *options).build_objective()


def test_noise_needs_a_layer_from_the_encoder():
    with pytest.raises(UserError, match="noise goes through the predictor's embedding"):
        small(
            "mae",
            "method.query={kind: noise, through_embed: true}",
            "method.predictor={kind: parallel, width: 12, heads: 2}",
        ).build_objective()


@pytest.mark.parametrize("layers", ["model.levels=[0,1]", "model.head_depth=2"])
def test_layers_that_nothing_reads_are_refused(layers):
    """They get no gradients, so that DDP ends at the second step."""
    mix = ["method.predictor.memory=mix", "model.final_norm=false"]
    for method, more in (("pretext_arrow", []), ("crossmae", mix)):
        with pytest.raises(UserError, match=f"{layers.split('=')[0]}: .* leave them out"):
            small(method, layers, *more).build_objective()
    small("crossmae", layers, "method.predictor.memory=last").build_objective()


@pytest.mark.parametrize("attention", ["causal", "frame"])
def test_a_class_token_that_nothing_reads_is_refused(attention):
    """No other token sees it then; with full attention all do."""
    given = ["model.depth=1", "model.class_token=true", f"model.attention={attention}"]
    aux = ["method.target={kind: ema, momentum: [0.9, 1.0]}", "method.aux=[{kind: class_mean, weight: 1}]"]
    own = "method.predictor={kind: joint, width: 24, depth: 1, heads: 2, class_token: own}"
    for method, more in (("videomae", []), ("videomae", [own]), ("pretext_arrow", []), ("maskfeat", [])):
        with pytest.raises(UserError, match=f"model.class_token: with model.attention={attention} no other"):
            small(method, *given, *more).build_objective()
        small(method, *given[:2], *more).build_objective()
    for method, more in (("mae", []), ("crossmae", ["model.final_norm=false"]), ("videomae", aux)):
        small(method, *given, *more).build_objective()


def test_the_head_of_ibot_sees_all_levels_in_both_branches():
    objective = small("ibot_patch", "model.levels=[0,1]", "model.head_depth=2").build_objective()
    video = torch.randn(2, 3, 1, 32, 32)
    assert objective(video, KeyedRNG(0, 0, torch.arange(2)))["loss"].isfinite()


def test_a_class_query_that_no_query_sees_is_refused():
    with pytest.raises(UserError, match="class_query: without self_attention no other query sees it"):
        small("crossmae", "method.predictor.class_query=true").build_objective()


def test_a_teacher_sees_pixels_with_its_own_statistics(tmp_path):
    """And the run's provenance has the hash of its file."""
    objective, video = method_and_clips("salt_stage2", *make_teacher("salt_stage2", tmp_path))
    teacher = objective.target.teacher
    want = F.layer_norm(teacher((video * STD + MEAN - 0.5) / 0.25), (64,))
    teacher.pixels = ([0.5] * 3, [0.25] * 3)
    torch.testing.assert_close(objective.target(video), want)
    tree = {"target": {"kind": "teacher", "path": str(tmp_path)}, "aux": [], "query": None}
    sha = hashlib.sha256((tmp_path / "encoder.safetensors").read_bytes()).hexdigest()
    assert network_hashes(tree) == {str(tmp_path): sha}
    flow = str(tmp_path / "encoder.safetensors")
    assert network_hashes({"score": {"flow": flow}, "target": {"flow": "blocks"}}) == {flow: sha}
    assert load_teacher(str(tmp_path)).pixels == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_teachers_must_fit(tmp_path):
    encoder = method_and_clips("videomae")[0].encoder
    image, wide = (Encoder(1, 32, 32, dim, 1, 1, patch=8, tubelet=1) for dim in (16, 32))
    with pytest.raises(UserError, match="differ in width"):
        Teachers(encoder, [image, wide], ("a", "b"), ("apart", "apart"))
    with pytest.raises(UserError, match="2 paths and 1 entries"):
        Teachers(encoder, [image, image], ("a", "b"), ("apart",))
    with pytest.raises(UserError, match="must be equal"):
        Teachers(encoder, [image, image], ("a", "b"), ("apart", "together"))
    both = Teachers(encoder, [image, image], ("a", "b"), ("apart", "apart"))
    with pytest.raises(UserError, match="copies: 3 do not divide"):
        ParallelPredictor(encoder, both.width, copies=3, width=12, heads=2)


def test_latent_mim():
    """Wei et al. 2024, section 3: the EMA encoder sees the hidden patches, each prediction must find its own
    among those of the image, and mean similarities are held at 0.75."""
    objective, video = method_and_clips("latent_mim", "method.aux=[{kind: similarity, weight: 0.1}]")
    (mask,) = masks_of(objective, video)
    found = objective(video, fresh(), [mask])["loss"]
    hidden = mask.target[:, 0]
    z = objective.encoder(video, mask.context, return_levels=True)
    target = objective.target.encoder(video, hidden, return_levels=True)[:, 1:]
    predictor = objective.predictor
    table = predictor.positions.table
    visible = predictor.embed(z)
    scores = torch.einsum("bqd,bkd->bqk", table[hidden], table[mask.context]) / table.shape[1] ** 0.5
    x = objective.query.token + scores.softmax(-1) @ visible[:, 1:] + table[hidden]
    x = torch.cat([predictor.class_query.expand(B, 1, -1), x], 1)
    memory = torch.cat([visible[:, :1], visible[:, 1:] + table[mask.context]], 1)
    for block, norm in zip(predictor.blocks, predictor.memory_norms, strict=True):
        own = block.norms["self"](x)
        x = x + block.own(own, own)
        x = x + block.cross(block.norms["cross"](x), norm(memory))
        x = x + block.mlp(block.norms["mlp"](x))
    pred = predictor.proj(predictor.norm(x))[:, 1:]
    standard = (pred - pred.mean(1, keepdim=True)) / (pred.std(1, keepdim=True) + 1e-4)
    loss = 0.0
    for clip in range(B):
        cosine = F.normalize(standard[clip], dim=-1) @ F.normalize(target[clip], dim=-1).T
        loss += 0.4 * F.cross_entropy(cosine / 0.2, torch.arange(len(cosine))) / B
    for tokens in (pred, z[:, 1:]):
        unit = F.normalize(tokens, dim=-1)
        loss += 0.1 * ((unit @ unit.transpose(1, 2)).mean() - 0.75) ** 2
    torch.testing.assert_close(found, loss)


def test_data2vec2():
    """Baevski et al. 2022, section 3: the mean of the layers' normed feed-forward outputs, several masks for
    each clip, convolutions over visible tokens and noise."""
    objective, video = method_and_clips("data2vec2")
    masks = masks_of(objective, video)
    assert len(masks) == 2 and not torch.equal(masks[0].context, masks[1].context)
    found = objective(video, fresh(), masks)["loss"]
    outputs = []
    encoder = objective.target.encoder
    hooks = [
        block.mlp.register_forward_hook(lambda module, args, output: outputs.append(output[:, 1:]))
        for block in encoder.blocks
    ]
    with torch.no_grad():
        encoder(video)
    for hook in hooks:
        hook.remove()
    standard = [
        (y - y.mean(1, keepdim=True)) / (y.var(1, False, keepdim=True) + 1e-5).sqrt() for y in outputs
    ]
    target = F.layer_norm((standard[0] + standard[1]) / 2, (48,))
    rng = fresh()
    losses = []
    for mask in masks:
        hidden = mask.target[:, 0]
        z = objective.encoder(video, mask.context, return_levels=True)
        grid = torch.zeros(B, 16, 48)
        noise = 0.01 * rng.normal(1, hidden.shape[1], 48)[:, 0]
        for clip in range(B):
            grid[clip, mask.context[clip]] = z[clip, 1:]
            grid[clip, hidden[clip]] = noise[clip]
        x = grid.reshape(B, 4, 4, 48)
        for layer in objective.predictor.layers:
            weight = layer.weight[:, :, 0]
            y = F.conv2d(x.permute(0, 3, 1, 2), weight, layer.bias, padding=1, groups=16).permute(0, 2, 3, 1)
            x = x + F.gelu(F.layer_norm(y, (48,)))
        pred = objective.predictor.proj(tokens_of(x.reshape(B, 16, 48), hidden))
        regression = 27.7128 * ((pred - tokens_of(target, hidden)) ** 2).mean()
        losses.append(regression + 70.9448 * ((z[:, 0] - target.mean(1)) ** 2).mean())
    torch.testing.assert_close(found, sum(losses) / 2)


def test_ibot_patch():
    """Zhou et al. 2021, section 3.2: the hidden patches of a corrupted image get the prototypes that the EMA
    of encoder and head gives to those of the whole one, centred and sharpened."""
    objective, video = method_and_clips("ibot_patch")
    target = objective.target
    target.assign.centre.copy_(0.2 * torch.linspace(-1, 1, 10))
    centre = target.assign.centre.clone()
    (mask,) = masks_of(objective, video)
    found = objective(video, fresh(), [mask])["loss"]
    hidden = mask.target[:, 0]

    def cosines(head, tokens):
        last = head[-1]
        directions = F.normalize(last.weight, dim=-1) * last.factors[:, None]
        return F.normalize(head[:-1](tokens), dim=-1) @ directions.T

    replaced = torch.zeros(B, 16, dtype=torch.bool).scatter(1, hidden, True)
    z = objective.encoder(video, replaced=(replaced, objective.corruption.token))
    pred = cosines(objective.predictor.proj, tokens_of(z, hidden))
    given = cosines(target.head, target.encoder(video))
    q = F.softmax((tokens_of(given, hidden) - centre) / 0.04, -1)
    torch.testing.assert_close(found, -(q * F.log_softmax(pred / 0.1, -1)).sum(-1).mean())
    before = target.head[0].weight.clone()
    target.update(objective.encoder, 0.75)
    torch.testing.assert_close(target.assign.centre, 0.99 * centre + 0.01 * given.mean((0, 1)))
    moved = 0.75 * before + 0.25 * objective.predictor.proj[0].weight
    torch.testing.assert_close(target.head[0].weight, moved)


def test_sigma(tmp_path):
    """Salehi et al. 2024, section 3: predictions and teacher's features, standardised over the clip's tokens,
    tell each other's cluster; the prototypes learn from the teacher's side alone."""
    objective, video = method_and_clips("sigma", *make_teacher("sigma", tmp_path))
    (mask,) = masks_of(objective, video)
    found = objective(video, fresh(), [mask])["loss"]
    frames = [objective.target.teacher(video[:, :, [t]]) for t in range(0, video.shape[2], 2)]
    features = torch.cat(frames, 1)
    features = features - features.mean(1, keepdim=True)
    features = features / (features.square().mean(1, keepdim=True) + 1e-5).sqrt()
    target = tokens_of(features, mask.target[:, 0]).flatten(0, 1)
    pred = prediction_of(objective.predictor, objective, video, mask).flatten(0, 2)
    prototypes = F.normalize(objective.error.prototypes, dim=-1)
    scores = [F.normalize(x, dim=-1) @ p.T for x, p in ((target, prototypes), (pred, prototypes.detach()))]
    best = [even_assignments(x.detach() / 0.05, 10).argmax(1) for x in scores]
    terms = [F.cross_entropy(scores[0] / 0.1, best[1]), F.cross_entropy(scores[1] / 0.1, best[0])]
    torch.testing.assert_close(found, terms[0] + terms[1])
    own = objective.error.prototypes
    gradients = [torch.autograd.grad(loss, own, retain_graph=True)[0] for loss in (found, terms[0])]
    torch.testing.assert_close(*gradients)
    assert objective.couples_clips


@pytest.mark.parametrize("method", ["mae_4ds", "omnimae"])
def test_simple_autoencoders_of_videos(method):
    """Squared error of the hidden patches' pixels, each colour with mean 0 and deviation 1."""
    objective, video = method_and_clips(method)
    (mask,) = masks_of(objective, video)
    ratio = {"mae_4ds": 0.95, "omnimae": 0.9}[method]
    assert mask.context.shape[1] == 64 - int(ratio * 64)
    pred = prediction_of(objective.predictor, objective, video, mask)[:, 0]
    losses = []
    for clip in range(B):
        for i, token in enumerate(mask.target[clip, 0].tolist()):
            parts = (video * STD + MEAN)[clip].unflatten(1, (-1, 2))[:, token // 16].unfold(2, 8, 8)
            patch = parts.unfold(3, 8, 8)[:, :, token % 16 // 4, token % 4].flatten(1)
            patch = (patch - patch.mean(1, keepdim=True)) / (patch.std(1, keepdim=True) + 1e-6)
            losses.append(((pred[clip, i] - patch.T.flatten()) ** 2).mean())
    torch.testing.assert_close(objective(video, fresh(), [mask])["loss"], torch.stack(losses).mean())
