"""Encoder, predictor and positions: what each option means, apart from the reference tensors
(test_parity)."""

import pytest
import torch

from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model import positions
from vidssl.model.grid import Grid, Mask, gather_tokens, patchify
from vidssl.model.heads import AttentiveHead
from vidssl.model.positions import (
    PositionEncoding,
    apply_rope,
    resize_table,
    rotary_table,
    sincos_2d,
    sincos_3d,
)
from vidssl.model.predictor import JointPredictor, MaskToken
from vidssl.model.vit import Encoder, TransformerStack
from vidssl.objective.ema_target import Ema, level_norm
from vidssl.objective.errors import ERRORS
from vidssl.objective.masked_prediction import MaskedPrediction, inverse_sqrt_distance
from vidssl.objective.schema import ContextLoss
from vidssl.objective.targets import Pixels

ANY_SIZE = [
    "sincos_uniform",
    "sincos",
    "sincos_flat",
    "learned",
    "learned_separable",
    "rope",
    "rope_interleaved",
]


def small(**options) -> Encoder:
    torch.manual_seed(0)
    return Encoder(8, 32, 32, **{"dim": 48, "depth": 2, "heads": 3, "patch": 8, **options})


def ids(n: int, keep: int, batch: int = 2) -> torch.Tensor:
    return torch.stack([torch.randperm(n)[:keep] for _ in range(batch)])


@pytest.mark.parametrize("positions", ANY_SIZE)
def test_encoder_on_permuted_ids(positions):
    encoder = small(positions=positions)
    video = torch.randn(2, 3, 8, 32, 32)
    order = ids(64, 64)
    assert torch.allclose(encoder(video, order), gather_tokens(encoder(video), order), atol=1e-5)


@pytest.mark.parametrize("positions", ANY_SIZE)
@pytest.mark.parametrize("shape", [(8, 48, 48), (8, 32, 64), (4, 40, 24), (16, 32, 32)])
def test_other_sizes(positions, shape):
    encoder = small(positions=positions)
    t, h, w = shape[0] // 2, shape[1] // 8, shape[2] // 8
    video = torch.randn(2, 3, *shape)
    assert encoder.grid_of(video) == Grid(t, h, w)
    assert encoder(video).shape == (2, t * h * w, 48)
    assert encoder(video, ids(t * h * w, 5)).shape == (2, 5, 48)


def test_size_not_divisible_by_patch():
    with pytest.raises(UserError, match="height 33"):
        small()(torch.randn(1, 3, 8, 33, 32))


def test_resized_table():
    old, new = Grid(4, 4, 4), Grid(4, 8, 8)
    table = resize_table(sincos_3d(old, 24, False), old, new)
    means = table.reshape(4, 4, 2, 4, 2, 24).mean((2, 4)).reshape(64, 24)
    assert torch.allclose(means, sincos_3d(old, 24, False), atol=0.12)
    assert resize_table(sincos_2d(Grid(1, 4, 4), 24), Grid(1, 4, 4), Grid(1, 6, 5)).shape == (30, 24)


@pytest.mark.parametrize("interleaved", [True, False])
def test_only_interleaved_rope_preserves_norms(interleaved):
    x = torch.randn(1, 2, 64, 16)
    turned = apply_rope(x, rotary_table(Grid(4, 4, 4), 16, interleaved, None, x.device))
    pairs = (turned.unflatten(-1, (-1, 2)).norm(dim=-1) - x.unflatten(-1, (-1, 2)).norm(dim=-1)).abs()
    assert (pairs.max() < 1e-5) == interleaved  # the published V-JEPA 2 layout is no rotation
    assert torch.equal(turned[..., 12:], x[..., 12:])  # 3 axes x 4 entries turn, the other 4 do not
    assert torch.equal(turned[:, :, 0], x[:, :, 0])  # at the origin nothing turns


def test_interleaved_rope_scores_are_relative():
    q, k = torch.randn(16), torch.randn(16)
    turn = rotary_table(Grid(4, 4, 4), 16, True, None, q.device)

    def score(a: int, b: int) -> float:
        x = torch.zeros(1, 1, 64, 16)
        x[0, 0, a], x[0, 0, b] = q, k
        y = apply_rope(x, turn)
        return (y[0, 0, a] @ y[0, 0, b]).item()

    assert score(0, 21) == pytest.approx(score(21, 42), abs=1e-5)
    assert score(0, 21) != pytest.approx(score(0, 42), abs=1e-3)


def test_rope_grid_is_independent_of_resolution():
    device = torch.device("cpu")
    cos4, _ = rotary_table(Grid(1, 4, 4), 24, True, 16, device)
    cos16, _ = rotary_table(Grid(1, 16, 16), 24, True, 16, device)
    corners4, corners16 = (
        cos4.reshape(4, 4, -1)[[0, -1]][:, [0, -1]],
        cos16.reshape(16, 16, -1)[[0, -1]][:, [0, -1]],
    )
    assert torch.allclose(corners4, corners16, atol=1e-5)


def test_separable_positions():
    position = PositionEncoding("learned_separable", Grid(2, 2, 3), 8, 1)
    table = position.embedding(Grid(2, 2, 3), None)
    assert torch.allclose(table[9], position.time[1] + position.space[3])


def test_invalid_options():
    for options, word in [
        ({"positions": "rope", "heads": 12}, "rotary"),
        ({"positions": "sincos_2d"}, "sincos_2d"),
        ({"levels": (1, 0)}, "levels"),
        ({"levels": (0,)}, "levels"),
        ({"heads": 5}, "heads"),
    ]:
        with pytest.raises(UserError, match=word):
            small(**options)
    with pytest.raises(UserError, match="class_token"):
        JointPredictor(small(), 8, class_token="encoder")


@pytest.mark.parametrize("ids", [None, torch.tensor([[1, 2, 7], [3, 0, 5]])])
def test_a_class_token_is_not_rotated(ids):
    positions = small(positions="rope", class_token=True).positions
    grid = Grid(2, 2, 2)
    for without, with_token, still in zip(
        positions.rope(grid, ids, torch.device("cpu")),  # type: ignore[arg-type]
        positions.rope(grid, ids, torch.device("cpu"), extra=1),  # type: ignore[arg-type]
        (1, 0),
        strict=True,
    ):
        axis = 0 if ids is None else 1
        first, rest = with_token.split([1, with_token.shape[axis] - 1], axis)
        assert torch.equal(rest, without) and (first == still).all()


@pytest.mark.parametrize("options", [{}, {"positions": "rope"}, {"mlp": "swiglu"}, {"levels": (0, 1)}])
def test_activation_checkpointing_keeps_gradients(options):
    encoder = small(**options)
    video = torch.randn(2, 3, 8, 32, 32)
    grads = []
    for recompute in (False, True):
        encoder.blocks.activation_checkpointing = recompute
        encoder.zero_grad()
        encoder(video, return_levels=True).square().mean().backward()
        grads.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads, strict=True))


def test_activation_checkpointing_saves_memory():
    def kept(recompute: bool) -> int:
        encoder = small(depth=6)
        total = 0
        encoder.blocks.activation_checkpointing = recompute

        def pack(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            encoder(torch.randn(1, 3, 8, 32, 32))
        return total

    assert kept(True) < 0.4 * kept(False)


def test_levels():
    encoder = small(levels=(0, 1))
    video = torch.randn(1, 3, 8, 32, 32)
    full = encoder(video, return_levels=True)
    assert full.shape == (1, 64, 96)
    assert torch.equal(full[..., 48:], encoder(video))
    x = encoder.patch_embed(patchify(video, 2, 8)) + encoder.positions.table
    (first,) = TransformerStack(encoder.blocks[:1])(x, None, [0])
    assert torch.allclose(full[..., :48], encoder.level_norms[0](first), atol=1e-5)
    normed = level_norm(full, 48)
    assert torch.allclose(normed[..., :48].mean(-1), torch.zeros(1, 64), atol=1e-5)
    assert torch.allclose(normed[..., 48:].var(-1, unbiased=False), torch.ones(1, 64), atol=1e-3)


def test_class_token_is_attended_to_and_not_returned():
    encoder = small(class_token=True)
    video = torch.randn(1, 3, 8, 32, 32)
    features = encoder(video)
    assert features.shape == (1, 64, 48)
    assert encoder(video, return_levels=True).shape == (1, 65, 48)
    with torch.no_grad():
        encoder.class_token += torch.randn(48)
    assert (encoder(video) - features).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["none", "own", "encoder"])
def test_class_token_of_predictor(kind):
    encoder = small(class_token=True)
    video = torch.randn(2, 3, 8, 32, 32)
    predictor = JointPredictor(encoder, 7, width=24, depth=1, heads=3, class_token=kind)
    order = ids(64, 30)
    mask = Mask(order[:, :10], order[:, None, 10:])
    z = encoder(video, mask.context, return_levels=True)
    before = predictor(z, mask, torch.zeros(24), encoder.grid).target
    assert before.shape == (2, 1, 20, 7)
    z[:, 0] += 5.0
    changed = not torch.allclose(predictor(z, mask, torch.zeros(24), encoder.grid).target, before)
    assert changed == (kind == "encoder")


def test_images_and_videos_have_their_own_tokenizer():
    encoder = small(image_tokenizer=True, positions="rope_interleaved", rope_grid=16)
    image, video = torch.randn(2, 3, 1, 32, 32), torch.randn(2, 3, 8, 32, 32)
    assert encoder(image).shape == (2, 16, 48)
    assert encoder(video).shape == (2, 64, 48)
    with torch.no_grad():
        before = encoder(video)
        encoder.img_mod_embed += 1
        encoder.patch_embed_img.proj.weight += 1
        assert torch.equal(encoder(video), before)
        after = encoder(image)
        encoder.video_mod_embed += 1
        assert torch.equal(encoder(image), after)


def test_inverse_sqrt_distance():
    grid = Grid(2, 2, 2)
    mask = Mask(torch.tensor([[0, 3, 4]]), torch.tensor([[[1, 7]]]))
    want = torch.tensor([1.0, 1.0, 2.0**-0.25])  # 0-1: 1; 3-7 and 3-1: 1; 4-7: sqrt 2
    assert torch.allclose(inverse_sqrt_distance(mask, grid)[0, 0], want, atol=1e-5)


def test_context_loss():
    context = ContextLoss(0.5, False, (10, 20))
    assert [context.weight_at(s) for s in (0, 10, 15, 20, 99)] == [0, 0, 0.25, 0.5, 0.5]
    encoder = small()
    video = torch.randn(2, 3, 8, 32, 32)
    order = ids(64, 40)
    masks = [Mask(order[:, :16], order[:, None, 16:])]
    predictor = JointPredictor(encoder, 48, width=24, depth=1, heads=3, context_head=True)
    parts = (encoder, lambda *_: masks, Ema(encoder), MaskToken(24), predictor, ERRORS["l1"]())
    out = MaskedPrediction(*parts, context)(video, KeyedRNG(0, 15, torch.arange(2)))
    assert torch.allclose(out["loss"], out["loss_0"] + 0.25 * out["context_loss_0"])
    with pytest.raises(UserError, match="go together"):
        MaskedPrediction(*parts)


def test_pixels_per_tubelet():
    encoder = small()
    video = torch.randn(1, 3, 8, 32, 32)
    some = Pixels(encoder, "none", "normalised", per_tubelet=1)(video)
    chosen = video[:, :, [0, 2, 4, 7]]  # linspace(0, 7, 4), cut to whole numbers
    assert some.shape == (1, 64, 192)
    assert torch.equal(some[0, 16].reshape(8, 8, 3), chosen[0, :, 1, :8, :8].permute(1, 2, 0))


def test_depth_rescale():
    plain = small(depth=4)
    scaled = small(depth=4, depth_rescale=True)
    for i in range(4):
        ratio = scaled.blocks[i].attn.proj.weight.std() / plain.blocks[i].attn.proj.weight.std()
        assert ratio.item() == pytest.approx((2 * (i + 1)) ** -0.5, rel=1e-5)
        assert torch.equal(scaled.blocks[i].attn.qkv.weight, plain.blocks[i].attn.qkv.weight)


def test_deep_attentive_head():
    torch.manual_seed(0)
    head = AttentiveHead(24, 3, 5, depth=4)
    tokens = torch.randn(2, 7, 24)
    (after,) = head.blocks(tokens, None, [2])
    alone = AttentiveHead(24, 3, 5)
    alone.load_state_dict({k: v for k, v in head.state_dict().items() if not k.startswith("blocks.")})
    assert torch.allclose(head(tokens), alone(after), atol=1e-5)


# Facts that are decided once, and precision


def build(positions: str = "sincos_uniform", image_tokenizer: bool = True) -> tuple[Encoder, JointPredictor]:
    torch.manual_seed(0)
    encoder = Encoder(
        4, 16, 16, dim=24, depth=2, heads=2, patch=8, positions=positions, image_tokenizer=image_tokenizer
    )
    predictor = JointPredictor(
        encoder, 5, width=24, depth=1, heads=2, positions=positions, modality=image_tokenizer
    )
    return encoder, predictor


@pytest.mark.parametrize("frames, image", [(1, True), (2, False), (4, False)])
@pytest.mark.parametrize("positions", ["sincos_uniform", "rope_interleaved"])
def test_encoder_and_predictor_agree_on_what_is_an_image(positions, frames, image):
    """A clip of one tubelet is a video, though its grid has one time slice as that of an image has."""
    encoder, predictor = build(positions)
    video = torch.randn(2, 3, frames, 16, 16)
    grid = encoder.grid_of(video)
    assert grid.image is image and grid.t == max(1, frames // 2)
    mask = Mask(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[[2]], [[0]]]))
    predictor(encoder(video, mask.context), mask, torch.zeros(24), grid).target.sum().backward()
    assert predictor.modality.grad.any(1).tolist() == [not image, image]
    assert (encoder.img_mod_embed.grad is not None) is image
    assert (encoder.video_mod_embed.grad is None) is image
    assert (encoder.patch_embed_img.proj.weight.grad is not None) is image


@pytest.mark.parametrize("image_tokenizer", [False, True])
@pytest.mark.parametrize("positions", ["sincos_uniform", "learned", "rope"])
def test_small_values_are_not_rounded_under_autocast(positions, image_tokenizer):
    """Tokens enter the blocks of encoder and predictor in f32: a query or a modality vector is not lost."""
    encoder, predictor = build(positions, image_tokenizer)
    inputs: dict[str, torch.Tensor] = {}
    for name, net in (("encoder", encoder), ("predictor", predictor)):
        net.blocks.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    video = torch.randn(2, 3, 4, 16, 16)
    grid = encoder.grid_of(video)
    mask = Mask(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[[4, 5]], [[6, 7]]]))
    query = 1 + 1e-4 * torch.randn(24)  # bf16 has steps of 8e-3 at 1
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder(video, mask.context)
        predictor(z, mask, query, grid)
    assert {x.dtype for x in inputs.values()} == {torch.float32}
    want = query + predictor.positions.embedding(grid, mask.target[:, 0])
    if image_tokenizer:
        want = want + predictor.modality[0]
    assert torch.allclose(inputs["predictor"][:, 2:], want.expand(2, 2, 24), atol=1e-6, rtol=0)


@pytest.mark.parametrize("per_tubelet", [None, 1])
@pytest.mark.parametrize("frames", [1, 3])
def test_a_clip_that_pixels_cannot_be_predicted_of_is_refused_in_a_line(frames, per_tubelet):
    target = Pixels(build()[0], per_tubelet=per_tubelet)
    target.check_clip(4, 16)
    with pytest.raises(UserError, match=f"kind pixels: a token is 2 frames.* stream of {frames};") as refused:
        target.check_clip(frames, 16)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_in_bf16_is_that_in_f32_up_to_rounding(interleaved):
    x = torch.randn(2, 64, 2, 3, 24)
    cos, sin = (t[:, None, None] for t in rotary_table(Grid(4, 4, 4), 24, interleaved, None, x.device))
    pairs = x.unflatten(-1, (-1, 2)).abs().amax(-1).repeat_interleave(2, -1)
    want = apply_rope(x.bfloat16().float(), (cos, sin))
    got = apply_rope(x.bfloat16(), (cos, sin))
    assert got.dtype == torch.bfloat16
    assert ((got.float() - want).abs() <= 2**-6 * pairs).all()


def test_rotary_tables_are_built_once(monkeypatch):
    built = []
    make = positions.rotary_table
    monkeypatch.setattr(positions, "rotary_table", lambda *given: built.append(given) or make(*given))
    encoder = small(positions="rope")
    with torch.inference_mode():
        encoder(torch.randn(1, 3, 8, 32, 32))
    for _ in range(2):  # a table of inference mode could not be used here
        encoder(torch.randn(1, 3, 8, 32, 32), ids(64, 9, 1)).sum().backward()
        encoder(torch.randn(1, 3, 4, 32, 32))
        with torch.autocast("cpu", torch.bfloat16):
            encoder(torch.randn(1, 3, 8, 32, 32))
    assert len(built) == 3 and "_rotary" not in str(encoder.state_dict().keys())
