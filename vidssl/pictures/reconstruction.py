"""Predicted patches as pixels: of methods that predict pixels, and of a decoder of features."""

from einops import rearrange, repeat
from torch import Tensor

from vidssl.core.pixels import channel_statistics
from vidssl.model.grid import Grid, gather_tokens, patchify
from vidssl.objective.target_base import Target
from vidssl.objective.targets import Pixels


def to_unit_range(video: Tensor) -> Tensor:
    """Pixels in 0..1 of a normalised video f32 [B, 3, T, H, W]."""
    mean, std = channel_statistics(video)
    return video * std + mean


def flat_patches(video: Tensor, grid: Grid) -> Tensor:
    """Video f32 [B, 3, T, H, W] to patches f32 [B, N, P] in (frame, row, column, colour) order."""
    tubelet = video.shape[2] // grid.t
    patches = patchify(video, tubelet, video.shape[3] // grid.h)
    return rearrange(patches, "b n c u p q -> b n (u p q c)")


def paste_patches(video: Tensor, patches: Tensor, ids: Tensor, grid: Grid) -> Tensor:
    """The video f32 [B, 3, T, H, W] with the tokens ids i64 [B, n] replaced by patches f32 [B, n, P]."""
    tubelet, rows, columns = video.shape[2] // grid.t, video.shape[3] // grid.h, video.shape[4] // grid.w
    whole = flat_patches(video, grid)
    whole = whole.scatter(1, ids[..., None].expand_as(patches), patches)
    pattern = "b (t h w) (u p q c) -> b c (t u) (h p) (w q)"
    return rearrange(whole, pattern, t=grid.t, h=grid.h, u=tubelet, p=rows, q=columns)


def predicts_pixels(target: Target) -> bool:
    """Whether `predicted_pixels` can show what is predicted."""
    return isinstance(target, Pixels)


def predicted_pixels(target: Pixels, prediction: Tensor, video: Tensor, ids: Tensor, grid: Grid) -> Tensor:
    """Pixels f32 [B, n, P] in 0..1 of a prediction f32 [B, n, K] at the tokens ids i64 [B, n].

    video: f32 [B, 3, T, H, W], normalised. Where the target is normalised in each patch or colour, the
    prediction gets the true mean and deviation back. A frame that is not predicted repeats the one before.
    """
    pixels = to_unit_range(video) if target.space == "rgb" else video
    frames = pixels.shape[2] // grid.t
    kept = target.frames
    true = rearrange(gather_tokens(flat_patches(pixels, grid), ids), "b n (k c) -> b n k c", c=3)
    shown = rearrange(prediction, "b n (k c) -> b n k c", c=3)
    if target.norm != "none":
        dims = 2 if target.norm == "channel" else (2, 3)
        shown = shown * true.std(dims, keepdim=True) + true.mean(dims, keepdim=True)
    if kept < frames:
        shown = repeat(shown, "b n (k s) c -> b n (k r s) c", k=kept, r=frames // kept)
    if target.space != "rgb":
        mean, std = channel_statistics(video)
        shown = shown * std.flatten() + mean.flatten()
    return rearrange(shown, "b n k c -> b n (k c)").clamp(0, 1)


def copied_pixels(video: Tensor, context: Tensor, ids: Tensor, grid: Grid) -> Tensor:
    """Pixels f32 [B, n, P] at the tokens ids i64 [B, n]: the last visible frame at their place before them,
    else the first visible one after them, else the mean colour of all visible patches.

    video: f32 [B, 3, T, H, W] in 0..1; context: i64 [B, Nc], the visible tokens.
    """
    patches = flat_patches(video, grid)
    frames = video.shape[2] // grid.t
    places = grid.h * grid.w
    visible = patches.new_zeros(len(patches), grid.n).scatter(1, context, 1.0)
    # of each hidden token the visibility of its place over time, [B, n, t]
    over_time = rearrange(visible, "b (t p) -> b p t", t=grid.t)
    seen = gather_tokens(over_time, ids % places) > 0
    slices = video.new_tensor(range(grid.t)).expand_as(seen)
    ahead = (ids // places)[..., None] - slices
    # the nearest earlier slice, else the nearest later one
    cost = ahead.where(ahead > 0, grid.t - ahead).masked_fill(~seen, float("inf"))
    nearest = cost.argmin(-1)
    source = gather_tokens(patches, nearest * places + ids % places)
    by_frame = rearrange(source, "b n (u k) -> b n u k", u=frames)
    is_past = (nearest < ids // places)[..., None]
    frame = by_frame[:, :, -1].where(is_past, by_frame[:, :, 0])
    colour = rearrange(gather_tokens(patches, context), "b n (k c) -> b n k c", c=3).mean((1, 2))
    plain = repeat(colour, "b c -> b n (k c)", n=ids.shape[1], k=frame.shape[-1] // 3)
    frame = frame.where(seen.any(-1, keepdim=True), plain)
    return repeat(frame, "b n k -> b n (u k)", u=frames)
