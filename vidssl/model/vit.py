"""The encoder: a 3-D patch ViT that embeds and runs only the tokens it is given."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from vidssl.config import Count, Positive
from vidssl.errors import UserError
from vidssl.model.grid import POSITIONS, Grid, patchify, take

Init = Literal["trunc_normal", "xavier"]
Positions = Literal["sincos_uniform", "sincos", "sincos_flat"]
EPS = 1e-6  # of every LayerNorm, as in both V-JEPA and VideoMAE (torch's default is 1e-5)


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
    """Multi-head self-attention; [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


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
    """video f32 [B, 3, T, H, W], ids i64 [B, Nc] | None -> [B, Nc, D] (all N tokens without ids).

    Patches that are not asked for are neither embedded nor attended to. Parameter names are those of V-JEPA's
    VisionTransformer, so its checkpoints map one to one.
    """

    pos_embed: Tensor

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
        positions: Positions = "sincos_uniform",
        init: Init = "trunc_normal",
        init_std: Positive = 0.02,
    ):
        """frames, height, width: of a clip, in frames and pixels; tubelet in frames, patch in pixels."""
        super().__init__()
        check_heads(dim, heads)
        for name, value, unit in (("frames", frames, tubelet), ("height", height, patch), ("width", width, patch)):
            if value % unit or value < unit:
                raise UserError(f"clip {name} {value} is not a multiple of the model's patch size {unit}")
        self.tubelet, self.patch, self.dim = tubelet, patch, dim
        self.grid = Grid(frames // tubelet, height // patch, width // patch)
        self.patch_embed = PatchEmbed(dim, tubelet, patch, init, init_std)
        self.register_buffer("pos_embed", POSITIONS[positions](self.grid, dim)[None], persistent=False)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        init_weights(self.blocks, init, init_std)

    def forward(self, video: Tensor, ids: Tensor | None = None) -> Tensor:
        patches, pos = patchify(video, self.tubelet, self.patch), self.pos_embed.expand(len(video), -1, -1)
        if ids is not None:
            patches, pos = take(patches, ids), take(pos, ids)
        x = self.patch_embed(patches) + pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


MODELS: dict[str, Callable[..., Encoder]] = {
    "vit": Encoder,
    "vit_tiny": partial(Encoder, dim=192, depth=12, heads=3),
    "vit_small": partial(Encoder, dim=384, depth=12, heads=6),
    "vit_base": partial(Encoder, dim=768, depth=12, heads=12),
    "vit_large": partial(Encoder, dim=1024, depth=24, heads=16),
    "vit_huge": partial(Encoder, dim=1280, depth=32, heads=16),
    "vit_giant": partial(Encoder, dim=1408, depth=40, heads=16, mlp_ratio=48 / 11),
}
