"""The encoder: a 3-D patch ViT that embeds and runs only the tokens it is given."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, SwiGLU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidssl.config import Count, Positive, Share, Size
from vidssl.core.errors import UserError
from vidssl.model.grid import Grid, gather_tokens, patchify
from vidssl.model.positions import PositionEncoding, PositionKind, RotaryTable, apply_rope

Init = Literal["trunc_normal", "xavier"]
Feedforward = Literal["gelu", "swiglu"]
LAYER_NORM_EPS = 1e-6  # of every LayerNorm, as in both V-JEPA and VideoMAE (torch's default is 1e-5)


def draw_weight(weight: Tensor, init: Init, std: float) -> None:
    """Truncated normal (V-JEPA: deviation 0.02, made for widths near 1,000) or Xavier uniform (VideoMAE), in place."""
    if init == "trunc_normal":
        nn.init.trunc_normal_(weight, std=std)
    else:
        nn.init.xavier_uniform_(weight)


def init_weights(module: nn.Module, init: Init, std: float = 0.02) -> None:
    """Every linear layer; zero biases."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            draw_weight(m.weight, init, std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Attention(nn.Module):
    """Multi-head self-attention; [B, N, D] -> [B, N, D], or with `last` [B, last, D]: of the last tokens only."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, turn: RotaryTable | None = None, last: int | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if turn is not None:
            q, k, v = (
                apply_rope(q, turn),
                apply_rope(k, turn),
                v.contiguous(),
            )  # so that q, k before it need not be kept
        if last is not None:
            q = q[:, :, -last:]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block. SwiGLU has 2/3 of the hidden width, rounded up to 8 (V-JEPA 2's `wide_silu`)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        mlp: Feedforward = "gelu",
        eps: float = LAYER_NORM_EPS,
    ):
        super().__init__()
        hidden = round(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, hidden) if mlp == "gelu" else SwiGLU(dim, -(-(2 * hidden // 3) // 8) * 8)
        self.drop_path = DropPath()

    def forward(self, x: Tensor, turn: RotaryTable | None = None, last: int | None = None) -> Tensor:
        """last: only so many tokens, from the end, come out; they attend to all."""
        mixed = self.attn(self.norm1(x), turn, last)
        x = (x if last is None else x[:, -last:]) + self.drop_path(mixed)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TransformerStack(nn.ModuleList):
    """A stack of blocks; with `activation_checkpointing` set, activations are recomputed in the backward pass instead of kept."""

    activation_checkpointing = False

    def forward(
        self, x: Tensor, turn: RotaryTable | None, layers: Sequence[int], last: int | None = None
    ) -> list[Tensor]:
        """-> what comes out of each of `layers` (numbers from 0); with `last`, only so many tokens of the last."""
        out = []
        for i, block in enumerate(self):
            some = last if i == len(self) - 1 else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, turn, some, use_reentrant=False)
            else:
                x = block(x, turn, some)
            if i in layers:
                out.append(x)
        return out

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): in training a sample passes by each half of a block
        with a chance that rises evenly from 0 in the first block to `rate` in the last."""
        for i, block in enumerate(self):
            assert isinstance(block, Block)
            block.drop_path.drop_prob = rate * i / max(1, len(self) - 1)

    def rescale(self) -> None:
        """Divide each block's two output weights by sqrt(2 * its number from 1), so that the sum of many grows less.

        Source: V-JEPA 2 (`_rescale_blocks`; of a SwiGLU it takes the second input weight, not the output). V-JEPA and
        I-JEPA call it too, but draw all weights again afterwards, so their published runs start without it.
        """
        with torch.no_grad():
            for i, block in enumerate(self, 1):
                assert isinstance(block, Block)
                second = block.mlp.fc1_x if isinstance(block.mlp, SwiGLU) else block.mlp.fc2
                for weight in (block.attn.proj.weight, second.weight):
                    weight.div_((2 * i) ** 0.5)


class PatchEmbed(nn.Module):
    """patches [B, n, 3, tubelet, patch, patch] -> [B, n, D]: a 3-D convolution's weights, applied to chosen patches."""

    def __init__(self, dim: int, tubelet: int, patch: int, init: Init, std: float):
        super().__init__()
        size = (tubelet, patch, patch)
        self.proj = nn.Conv3d(3, dim, size, stride=size)
        draw_weight(self.proj.weight.data.flatten(1), init, std)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


def check_heads(dim: int, heads: int) -> None:
    if dim % heads:
        raise UserError(f"width {dim} cannot be divided among {heads} heads: give a multiple of {heads}")


class Encoder(nn.Module):
    """video f32 [B, 3, T, H, W], ids i64 [B, Nc] | None -> features [B, Nc, D] (of all N tokens without ids).

    Patches that are not asked for are neither embedded nor attended to. Any T, H and W that are multiples of the patch
    will do; tables of positions are then interpolated from the native grid. Parameter names follow V-JEPA's
    VisionTransformer where it has them.
    """

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        dim: Count,
        depth: Count,
        heads: Count,
        mlp_ratio: Positive = 4.0,
        tubelet: Count = 2,
        patch: Count = 16,
        positions: PositionKind = "sincos_uniform",
        rope_grid: Count | None = None,
        mlp: Feedforward = "gelu",
        class_token: bool = False,
        image_tokenizer: bool = False,
        levels: tuple[Size, ...] = (),
        final_norm: bool = True,
        eps: Positive = LAYER_NORM_EPS,
        init: Init = "trunc_normal",
        init_std: Positive = 0.02,
        depth_rescale: bool = False,
        drop_path: Share = 0.0,
    ):
        """frames, height, width: of a native clip, in frames and pixels; tubelet in frames, patch in pixels.

        positions: see model/positions.py; rope_grid: places across, on which rotary rows and columns are laid out
        whatever the input (V-JEPA 2.1: 16). mlp: the feed-forward layer. class_token: a learned token without a place
        (MAE, MAE-ST). image_tokenizer: a clip of one frame has an embedding of its own, and an added vector tells
        images from videos (V-JEPA 2.1). levels: layers, from 0, of which a predictor gets the normed output beside the
        last (V-JEPA 2.1); the last one must be among them. final_norm: off in models fine-tuned on the mean of tokens
        (VideoMAE). depth_rescale: see Blocks.rescale; drop_path: see Blocks.set_drop_path.
        """
        super().__init__()
        check_heads(dim, heads)
        if levels and (list(levels) != sorted(set(levels)) or levels[-1] != depth - 1):
            raise UserError(
                f"model.levels {list(levels)}: give layers in rising order, the last one is {depth - 1}"
            )
        if class_token and positions.startswith("rope"):
            raise UserError("model.class_token has no place, so it does not go with rotary positions")
        self.tubelet, self.patch, self.dim = tubelet, patch, dim
        self.levels: tuple[int, ...] = tuple(levels) or (depth - 1,)
        self.width = dim * len(self.levels)  # of what a predictor is given
        self.patch_embed = PatchEmbed(dim, tubelet, patch, init, init_std)
        self.patch_embed_img = PatchEmbed(dim, 1, patch, init, init_std) if image_tokenizer else None
        self.grid = self._grid(frames, height, width)
        if image_tokenizer:
            self.img_mod_embed = nn.Parameter(1e-6 * torch.randn(dim))
            self.video_mod_embed = nn.Parameter(1e-6 * torch.randn(dim))
        self.class_token = nn.Parameter(0.02 * torch.randn(dim)) if class_token else None
        self.positions = PositionEncoding(positions, self.grid, dim, heads, rope_grid)
        self.blocks = TransformerStack(Block(dim, heads, mlp_ratio, mlp, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=eps) if final_norm else nn.Identity()
        self.level_norms = nn.ModuleList(nn.LayerNorm(dim, eps=eps) for _ in self.levels[:-1])
        init_weights(self.blocks, init, init_std)
        self.blocks.set_drop_path(drop_path)
        if depth_rescale:
            self.blocks.rescale()

    def _grid(self, frames: int, height: int, width: int) -> Grid:
        tubelet = 1 if self.patch_embed_img and frames == 1 else self.tubelet
        for name, value, unit in (
            ("frames", frames, tubelet),
            ("height", height, self.patch),
            ("width", width, self.patch),
        ):
            if value % unit or value < unit:
                raise UserError(f"clip {name} {value} is not a multiple of the model's patch size {unit}")
        return Grid(frames // tubelet, height // self.patch, width // self.patch)

    def grid_of(self, video: Tensor) -> Grid:
        """The grid of [B, 3, T, H, W]."""
        return self._grid(*video.shape[2:])

    def forward(self, video: Tensor, ids: Tensor | None = None, full: bool = False) -> Tensor:
        """full: what a predictor is given, [B, (1 +) Nc, levels * D], the class token first if there is one."""
        grid, image = self.grid_of(video), bool(self.patch_embed_img) and video.shape[2] == 1
        patches = patchify(video, video.shape[2] // grid.t, self.patch)
        if ids is not None:
            patches = gather_tokens(patches, ids)
        embed = self.patch_embed_img if image else self.patch_embed
        x = embed(patches) + self.positions.added(grid, ids)  # type: ignore[misc]
        if self.patch_embed_img:
            x = x + (self.img_mod_embed if image else self.video_mod_embed)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], 1)
        *lower, last = self.blocks(
            x, self.positions.turn(grid, ids, x.device), self.levels if full else self.levels[-1:]
        )
        norms = zip(lower, self.level_norms, strict=False)
        x = torch.cat([*(norm(y) for y, norm in norms), self.norm(last)], -1) if lower else self.norm(last)
        return x if full or self.class_token is None else x[:, 1:]


MODELS: dict[str, Callable[..., Encoder]] = {
    "vit": Encoder,
    "vit_tiny": partial(Encoder, dim=192, depth=12, heads=3),
    "vit_small": partial(Encoder, dim=384, depth=12, heads=6),
    "vit_base": partial(Encoder, dim=768, depth=12, heads=12),
    "vit_large": partial(Encoder, dim=1024, depth=24, heads=16),
    "vit_huge": partial(Encoder, dim=1280, depth=32, heads=16),
    "vit_giant": partial(Encoder, dim=1408, depth=40, heads=16, mlp_ratio=48 / 11),
}
