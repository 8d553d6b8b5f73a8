"""The encoder: a 3-D patch ViT that embeds and processes only the given tokens."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, SwiGLU
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from vidssl.config import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from vidssl.core.constants import constant
from vidssl.core.errors import UserError
from vidssl.core.pixels import MEAN, STD
from vidssl.core.rng import KeyedRNG
from vidssl.core.suggestions import divisors_near, multiples_near
from vidssl.model.attention import AttentionPattern, attention_pattern
from vidssl.model.conditioning import Modulation, NoiseLevel, block_changes, gated, shifted
from vidssl.model.grid import Grid, ImageGrid, gather_tokens, patchify
from vidssl.model.output_head import output_head
from vidssl.model.positions import PositionEncoding, PositionKind, RotaryTable, apply_rope

Init = Literal["trunc_normal", "xavier"]
Feedforward = Literal["gelu", "swiglu"]
BlockNorm = Literal["pre", "post"]
LAYER_NORM_EPS = 1e-6  # as in both V-JEPA and VideoMAE (torch's default is 1e-5)


def draw_weight(weight: Tensor, init: Init, std: float) -> None:
    """In place: truncated normal (V-JEPA: std 0.02, chosen for widths near 1,000) or Xavier uniform
    (VideoMAE)."""
    if init == "trunc_normal":
        nn.init.trunc_normal_(weight, std=std)
    else:
        nn.init.xavier_uniform_(weight)


def init_weights(module: nn.Module, init: Init, std: float = 0.02) -> None:
    """Draws the weights of every linear layer in `module`; biases are zero, and modulations stay so."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer, Modulation):
            draw_weight(layer.weight, init, std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# The kernels of attention without cuDNN's, which plans each new shape, for some 50 ms of the host's time.
KERNELS_OF_ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Attention(nn.Module):
    """Multi-head self-attention of x [B, n, D]. Returns [B, n, D]; with num_outputs, only the last
    num_outputs tokens, which attend to all."""

    counts_vary = False  # whether n differs from call to call, as it does with V-JEPA's masks

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        rope: RotaryTable | None = None,
        num_outputs: int | None = None,
        attends: Tensor | None = None,
    ) -> Tensor:
        """attends bool [B or 1, 1, n, n]: whether a query (row) attends to a key; None: each to all."""
        # Parted along a middle axis, so that the backward pass joins the gradients in one copy.
        qkv = rearrange(self.qkv(x), "b n (qkv h d) -> b n qkv h d", qkv=3, h=self.heads)
        if rope is None:
            q, k, v = qkv.unbind(2)
        else:
            qk, v = qkv.split([2, 1], 2)
            q, k = apply_rope(qk, rope).unbind(2)
            v = v.squeeze(2).contiguous()  # then the backward pass need not keep the joint qkv
        if num_outputs is not None:
            q = q[:, -num_outputs:]
            attends = None if attends is None else attends[..., -num_outputs:, :]
        q, k, v = (rearrange(t, "b n h d -> b h n d") for t in (q, k, v))
        with sdpa_kernel(KERNELS_OF_ANY_SHAPE) if self.counts_vary else nullcontext():
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attends)
        return self.proj(rearrange(attended, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Transformer block; norm: of the inputs of attention and MLP (pre), or of their sums with the residual
    (post). condition: width of what changes the norms (conditioning.py); 0: none."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        mlp: Feedforward = "gelu",
        eps: float = LAYER_NORM_EPS,
        norm: BlockNorm = "pre",
        condition: int = 0,
    ):
        super().__init__()
        if condition and norm == "post":
            raise UserError("model.conditioned needs model.block_norm=pre")
        hidden_dim = round(dim * mlp_ratio)
        self.is_post = norm == "post"
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden_dim) if mlp == "gelu" else SwiGLU(dim, swiglu_dim(hidden_dim))
        self.modulation = Modulation(condition, dim, 6) if condition else None

    def forward(
        self,
        x: Tensor,
        rope: RotaryTable | None = None,
        num_outputs: int | None = None,
        path_scale: Tensor | None = None,
        attends: Tensor | None = None,
        mlp_output: bool = False,
        condition: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With num_outputs, only the last num_outputs tokens are returned; the others are keys and values.
        path_scale f32 [B, 2, 1, 1]: factors on the outputs of attention and MLP (stochastic depth); attends:
        see Attention; mlp_output: returns that of the MLP, too; condition: [B, C]."""
        first, second = block_changes(self.modulation, condition)
        normed = x if self.is_post else shifted(self.norm1(x), first)
        attended = gated(self.attn(normed, rope, num_outputs, attends), first)
        attended = attended if path_scale is None else attended * path_scale[:, 0]
        x = (x if num_outputs is None else x[:, -num_outputs:]) + attended
        x = self.norm1(x) if self.is_post else x
        hidden = gated(self.mlp(x if self.is_post else shifted(self.norm2(x), second)), second)
        x = x + (hidden if path_scale is None else hidden * path_scale[:, 1])
        x = self.norm2(x) if self.is_post else x
        return (x, hidden) if mlp_output else x


def swiglu_dim(hidden_dim: int) -> int:
    """Hidden width of a SwiGLU in place of an MLP of `hidden_dim`: 2/3 of it, rounded up to a multiple of 8
    (V-JEPA 2's `wide_silu`)."""
    return -(-(2 * hidden_dim // 3) // 8) * 8


class TransformerStack(nn.ModuleList):
    """A stack of blocks. activation_checkpointing: activations are recomputed in the backward pass, not
    stored."""

    activation_checkpointing = False
    # Stochastic depth (Huang et al. 2016, arXiv 1603.09382): in training a sample skips each half of a block
    # with a probability that rises linearly from 0 in the first block to this rate in the last.
    drop_path = 0.0

    def forward(
        self,
        x: Tensor,
        rope: RotaryTable | None,
        layers: Sequence[int],
        num_outputs: int | None = None,
        rng: KeyedRNG | None = None,
        attends: Tensor | None = None,
        mlp_outputs: bool = False,
        condition: Tensor | None = None,
    ) -> list[Tensor]:
        """Outputs of the given 0-based layers, or of their MLPs; the final layer returns only its last
        `num_outputs` tokens. rng: of stochastic depth; without one no sample skips a layer. attends: see
        Attention; condition: see Block."""
        scales = self._draw_path_scales(rng)
        outputs = []
        for i, (block, scale) in enumerate(zip(self, scales, strict=True)):
            block_outputs = num_outputs if i == len(self) - 1 else None
            if mlp_outputs:
                x, output = block(x, rope, block_outputs, scale, attends, True, condition)
                outputs += [output] if i in layers else []
                continue
            if self.activation_checkpointing and torch.is_grad_enabled():
                arguments = (x, rope, block_outputs, scale, attends, False, condition)
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(x, rope, block_outputs, scale, attends, False, condition)
            if i in layers:
                outputs.append(x)
        return outputs

    def _draw_path_scales(self, rng: KeyedRNG | None) -> Sequence[Tensor | None]:
        """For each block the factors f32 [B, 2, 1, 1] on its halves: 0 for a sample that skips it, else 1 /
        the probability that it does not."""
        if rng is None or not self.training or not self.drop_path:
            return [None] * len(self)
        u = rng.rand(len(self), 2, 1, 1)
        # float64, so that a rate of 1 in the last block is exact
        rates = np.linspace(0, self.drop_path, len(self))
        keep = constant(tuple(1 - rates), u.device)[:, None, None, None]
        return ((u < keep) / keep.clamp_min(torch.finfo(torch.float32).tiny)).unbind(1)

    def rescale(self) -> None:
        """Divides the two output weights of block i = 1, 2, ... by sqrt(2 i), to limit growth of the
        residual stream with depth.

        Source: V-JEPA 2 (`_rescale_blocks`; of a SwiGLU it rescales the second input weight, not the output
        weight). V-JEPA and I-JEPA call it too, but draw all weights again afterwards, so their published runs
        start without it.
        """
        with torch.no_grad():
            for i, block in enumerate(self, 1):
                assert isinstance(block, Block)
                second = block.mlp.fc1_x if isinstance(block.mlp, SwiGLU) else block.mlp.fc2
                for weight in (block.attn.proj.weight, second.weight):
                    weight.div_((2 * i) ** 0.5)


class PatchEmbed(nn.Module):
    """Embeds patches [B, n, 3, tubelet, patch, patch] as [B, n, D] with the weights of a 3-D convolution."""

    def __init__(self, dim: int, tubelet: int, patch: int, init: Init, std: float):
        super().__init__()
        kernel = (tubelet, patch, patch)
        self.proj = nn.Conv3d(3, dim, kernel, stride=kernel)
        draw_weight(self.proj.weight.data.flatten(1), init, std)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


def check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise UserError(f"{heads} heads do not divide the width {dim}: give {divisors_near(dim, heads)}")


class Encoder(nn.Module):
    """Maps video f32 [B, 3, T, H, W] and ids i64 [B, Nc] to features [B, Nc, D] (all N tokens without ids).

    Other patches are neither embedded nor attended to. T, H and W may be any multiples of the patch; tables
    of positions are then interpolated from the native grid. Parameter names follow V-JEPA's VisionTransformer
    where it has them.
    """

    pixels: Any = (MEAN, STD)  # mean and deviation with which its clips are normalised

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        dim: PositiveInt,
        depth: PositiveInt,
        heads: PositiveInt,
        mlp_ratio: PositiveFloat = 4.0,
        tubelet: PositiveInt = 2,
        patch: PositiveInt = 16,
        positions: PositionKind = "sincos_uniform",
        rope_grid: PositiveInt | None = None,
        mlp: Feedforward = "gelu",
        block_norm: BlockNorm = "pre",
        attention: AttentionPattern = "full",
        class_token: bool = False,
        image_tokenizer: bool = False,
        levels: tuple[NonNegativeInt, ...] = (),
        final_norm: bool = True,
        head_depth: NonNegativeInt = 0,
        head_width: PositiveInt = 4096,
        eps: PositiveFloat = LAYER_NORM_EPS,
        init: Init = "trunc_normal",
        init_std: PositiveFloat = 0.02,
        depth_rescale: bool = False,
        drop_path: Fraction = 0.0,
        conditioned: bool = False,
    ):
        """frames, height, width: size of a native clip, in frames and pixels; dim: width of the tokens;
        depth: number of blocks; heads: of each block's attention; mlp_ratio: width of an MLP's hidden layer,
        in dim; tubelet: frames of a token; patch: side of a token, in pixels.

        positions: see model/positions.py. rope_grid: side of the grid onto which rotary rows and columns are
        stretched whatever the input (V-JEPA 2.1: 16). mlp: the feed-forward layer. block_norm: post, after
        each half of a block and before the first block, not after the last (data2vec 2.0). attention: full,
        within a time slice (frame), or to this and earlier time slices (causal). class_token: a learned token
        without a position (MAE, MAE-ST). image_tokenizer: a clip of one frame has its own patch embedding,
        and an added vector tells images from videos (V-JEPA 2.1). levels: 0-based layers whose normed outputs
        the predictor receives (V-JEPA 2.1); the last layer must be among them. final_norm: False in models
        fine-tuned on the mean of tokens (VideoMAE). head_depth: layers of an MLP, head_width wide, on what
        the predictor receives and an EMA target is (Latent MIM); it is not evaluated. depth_rescale: see
        TransformerStack.rescale; drop_path: see TransformerStack.drop_path. conditioned: the blocks are told
        the noise level of the clip (UMD); without one it is clean.
        """
        super().__init__()
        check_heads(dim, heads)
        if levels and (list(levels) != sorted(set(levels)) or levels[-1] != depth - 1):
            raise UserError(
                f"model.levels {list(levels)}: give layers in rising order, the last one is {depth - 1}"
            )
        self.tubelet = tubelet
        self.patch = patch
        self.dim = dim
        self.attention = attention
        self.levels: tuple[int, ...] = tuple(levels) or (depth - 1,)
        self.feature_width = dim * len(self.levels)  # of the output with return_levels
        self.patch_embed = PatchEmbed(dim, tubelet, patch, init, init_std)
        self.patch_embed_img = PatchEmbed(dim, 1, patch, init, init_std) if image_tokenizer else None
        self.grid = self._grid(frames, height, width)
        if image_tokenizer:
            self.img_mod_embed = nn.Parameter(1e-6 * torch.randn(dim))
            self.video_mod_embed = nn.Parameter(1e-6 * torch.randn(dim))
        self.class_token = nn.Parameter(0.02 * torch.randn(dim)) if class_token else None
        self.positions = PositionEncoding(positions, self.grid, dim, heads, rope_grid)
        self.blocks = TransformerStack(
            Block(dim, heads, mlp_ratio, mlp, eps, block_norm, dim if conditioned else 0)
            for _ in range(depth)
        )
        self.noise_level = NoiseLevel(dim) if conditioned else None
        post = block_norm == "post"
        self.input_norm = nn.LayerNorm(dim, eps=eps) if post else nn.Identity()
        self.norm = nn.LayerNorm(dim, eps=eps) if final_norm and not post else nn.Identity()
        self.level_norms = nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in self.levels[:-1])
        self.output_head = output_head(self.feature_width, head_width, head_depth)
        init_weights(self.output_head, init, init_std)
        init_weights(self.blocks, init, init_std)
        self.blocks.drop_path = drop_path
        if depth_rescale:
            self.blocks.rescale()

    def _grid(self, frames: int, height: int, width: int) -> Grid:
        tubelet = 1 if self.patch_embed_img and frames == 1 else self.tubelet
        sizes = (
            ("frames", frames, "tubelet", tubelet),
            ("height", height, "patch", self.patch),
            ("width", width, "patch", self.patch),
        )
        for name, size, option, unit in sizes:
            if size % unit or size < unit:
                near = multiples_near(size, unit)
                raise UserError(f"clip {name} {size} is not a multiple of model.{option} {unit}: give {near}")
        kind = ImageGrid if frames == 1 else Grid
        return kind(frames // tubelet, height // self.patch, width // self.patch)

    def grid_of(self, video: Tensor) -> Grid:
        """The token grid of a video [B, 3, T, H, W]."""
        return self._grid(*video.shape[2:])

    def condition_of(self, level: Tensor | None, clips: int, device: torch.device) -> Tensor | None:
        """[B, D] for clips of these noise levels f32 [B]; None where the encoder is not conditioned. level
        None: the clips are clean."""
        if self.noise_level is None:
            return None
        return self.noise_level(torch.zeros(clips, device=device) if level is None else level)

    def patch_embed_of(self, grid: Grid) -> PatchEmbed:
        """The embedding of the patches of a grid, which may be an image's."""
        return self.patch_embed_img if self.patch_embed_img is not None and grid.image else self.patch_embed

    def forward(
        self,
        video: Tensor,
        ids: Tensor | None = None,
        return_levels: bool = False,
        rng: KeyedRNG | None = None,
        replaced: tuple[Tensor, Tensor] | None = None,
        all_layers: bool | Literal["mlp"] = False,
        with_class: bool = False,
        condition: Tensor | None = None,
    ) -> Tensor:
        """return_levels: returns the predictor's input [B, (1 +) Nc, levels * D], with the class token first
        if there is one; all_layers: so the input of the first block and the output of every block, without
        norms, [B, (1 +) Nc, (depth + 1) * D], or with "mlp" in their place the output of its MLP. rng: of
        stochastic depth; without one no sample skips a layer. replaced: (tokens bool [B, N], vector [D]) that
        stands in for their patches (MaskFeat, BEiT). with_class: the class token comes
        first if there is one. condition: of condition_of; None: that of clean clips."""
        grid = self.grid_of(video)
        patches = patchify(video, video.shape[2] // grid.t, self.patch)
        if ids is not None:
            patches = gather_tokens(patches, ids)
        # The residual stream is f32 under autocast, too, whatever kind of positions is added.
        x = self.patch_embed_of(grid)(patches).float()
        if replaced is not None:
            hidden = replaced[0] if ids is None else replaced[0].gather(1, ids)
            x = torch.where(hidden[..., None], replaced[1].float(), x)
        x = x + self.positions.embedding(grid, ids)
        if self.patch_embed_img is not None:
            x = x + (self.img_mod_embed if grid.image else self.video_mod_embed)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], 1, -1), x], 1)
        x = self.input_norm(x)
        rope = self.positions.rope(grid, ids, x.device, int(self.class_token is not None))
        attends = attention_pattern(self.attention, grid, ids, x.shape[1], x.device)
        if condition is None:
            # len() would fix the number of clips in a traced program
            condition = self.condition_of(None, x.shape[0], x.device)
        if all_layers:
            layers = range(len(self.blocks))
            options = {"rng": rng, "attends": attends, "condition": condition}
            outputs = self.blocks(x, rope, layers, mlp_outputs=all_layers == "mlp", **options)
            return torch.cat([x, *outputs], -1)
        levels = self.levels if return_levels else self.levels[-1:]
        *lower, last = self.blocks(x, rope, levels, rng=rng, attends=attends, condition=condition)
        features = [norm(level) for norm, level in zip(self.level_norms, lower, strict=False)]
        x = torch.cat([*features, self.norm(last)], -1) if lower else self.norm(last)
        if return_levels:
            return self.output_head(x)
        return x if self.class_token is None or with_class else x[:, 1:]


MODELS: dict[str, Callable[..., Encoder]] = {
    "vit": Encoder,
    "vit_tiny": partial(Encoder, dim=192, depth=12, heads=3),
    "vit_small": partial(Encoder, dim=384, depth=12, heads=6),
    "vit_base": partial(Encoder, dim=768, depth=12, heads=12),
    "vit_large": partial(Encoder, dim=1024, depth=24, heads=16),
    "vit_huge": partial(Encoder, dim=1280, depth=32, heads=16),
    "vit_giant": partial(Encoder, dim=1408, depth=40, heads=16, mlp_ratio=48 / 11),
}
