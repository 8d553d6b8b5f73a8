"""What a decoder renders behind the mask: figures beside baselines that cannot flatter, and a picture."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from torch import Tensor

from vidssl.core.progress import track
from vidssl.core.rng import KeyedRNG
from vidssl.evaluation.metrics import bootstrap_metric_ci
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.pictures.decode import clean_patches, context_of
from vidssl.pictures.flow_decoder import FlowDecoder, sample_patches
from vidssl.pictures.panels import HIDDEN_GREY, PanelRow, VideoPanel, enlarge, mark_frames
from vidssl.pictures.reconstruction import (
    copied_pixels,
    flat_patches,
    paste_patches,
    predicted_pixels,
    predicts_pixels,
    to_unit_range,
)
from vidssl.pictures.run_clips import HeldOutClip
from vidssl.pictures.runs import MaskPrediction, draw_mask, predict_mask

CLIPS_AT_ONCE = 8
FLOW_STEPS = 16  # of Euler's method, for a sample
TRIED_MASKS = 16  # steps, of which the one is shown whose mask reaches farthest in time
SHOWN_SAMPLES = 3
PREDICTED_EDGE = (255, 140, 0)
LEAST_ERROR = 1e-10  # mean squared
SEEN = "encoder\nsees"  # name of a panel
# name of a rendering -> what it is
RENDERINGS = {
    "prediction": "mean of the samples, given the predictions",
    "one_sample": "a single sample, given the predictions",
    "nothing": "mean of the samples of the same decoder, given nothing",
    "other_clip": "mean of the samples, given the predictions for another clip",
    "last_frame": "the last visible frame at each place, copied",
    "own": "the run's own prediction of pixels",
}


class Rendered(NamedTuple):
    """A batch of clips with what was rendered behind the mask; patches f32 [B, n, P] in 0..1."""

    prediction: MaskPrediction
    clean: Tensor  # the truth
    samples: Tensor  # f32 [B, S, n, P], given the predictions
    without: Tensor  # f32 [B, S, n, P], given nothing
    means: dict[str, Tensor]  # name of a rendering -> patches


def farthest_step(part: MaskedPrediction, clips: Tensor, seed: int) -> int:
    """The step, of a few, whose mask reaches farthest in time."""

    def reach(step: int) -> int:
        mask = mask_of_step(part, clips, seed, step)[0]
        return int(torch.cat([mask.context.flatten(), mask.target.flatten()]).max())

    return max(range(TRIED_MASKS), key=reach)


def mask_of_step(
    part: MaskedPrediction, clips: Tensor, seed: int, step: int, first: int = 0
) -> tuple[Mask, KeyedRNG]:
    """The mask of clips that are number `first` and following of a step."""
    rng = KeyedRNG(seed, step, first + torch.arange(len(clips)))
    return draw_mask(part, clips, rng), rng


@torch.no_grad()
def render_clips(
    part: MaskedPrediction,
    decoder: FlowDecoder,
    clips: Tensor,
    others: Tensor,
    samples: int,
    seed: int,
    step: int,
    first: int,
) -> Rendered:
    """Renders clips u8 [B, 3, T, S, S] behind the mask of a step. others: as many other clips, whose
    predictions behind the same mask are a baseline; first: number of the first clip."""
    mask, rng = mask_of_step(part, clips, seed, step, first)
    prediction = predict_mask(part, clips, mask, rng)
    wrong = predict_mask(part, others, mask, rng)
    clean = clean_patches(prediction)
    generator = torch.Generator().manual_seed(seed * (1 << 32) + first)
    shape = (len(clips), samples, *clean.shape[1:])
    noise = torch.randn(shape, generator=generator).to(clips.device)
    context = context_of(prediction, decoder.context is not None)

    def draw(values: Tensor, is_given: bool) -> Tensor:
        given = torch.full((len(clips),), is_given, device=clips.device)
        return sample_patches(decoder, values, prediction.ids, given, noise, FLOW_STEPS, context)

    drawn = draw(prediction.values, True)
    without = draw(prediction.values, False)
    pixels = to_unit_range(prediction.video)
    means = {
        "prediction": drawn.mean(1),
        "one_sample": drawn[:, 0],
        "nothing": without.mean(1),
        "other_clip": draw(wrong.values, True).mean(1),
        "last_frame": copied_pixels(pixels, prediction.context, prediction.ids, prediction.grid),
    }
    if predicts_pixels(part.target):
        means["own"] = predicted_pixels(
            part.target,  # type: ignore[arg-type]
            prediction.values,
            prediction.video,
            prediction.ids,
            prediction.grid,
        )
    return Rendered(prediction, clean, drawn, without, means)


def render_all(
    part: MaskedPrediction,
    decoder: FlowDecoder,
    clips: Sequence[HeldOutClip],
    others: Tensor,
    samples: int,
    seed: int,
) -> list[Rendered]:
    """Renders all clips, a few at a time. others: u8 [n, 3, T, S, S], other clips, one for each."""
    device = others.device
    stacked = torch.stack([clip.clip for clip in clips])
    step = farthest_step(part, stacked[:CLIPS_AT_ONCE].to(device), seed)
    firsts = range(0, len(stacked), CLIPS_AT_ONCE)
    rendered = []
    for first in track(firsts, "render", f"groups of {CLIPS_AT_ONCE} clips"):
        some = stacked[first : first + CLIPS_AT_ONCE].to(device)
        wrong = others[first : first + len(some)]
        rendered.append(render_clips(part, decoder, some, wrong, samples, seed, step, first))
    return rendered


def errors(rendered: Sequence[Rendered]) -> dict[str, np.ndarray]:
    """Mean squared error f64 [clips] behind the mask of each rendering, pixels in 0..1."""

    def of_batch(batch: Rendered, patches: Tensor) -> Tensor:
        weight = (batch.prediction.weight > 0).float()
        error = (patches - batch.clean).square().mean(-1)
        return (error * weight).sum(1) / weight.sum(1).clamp_min(1)

    names = rendered[0].means
    return {
        name: torch.cat([of_batch(b, b.means[name]) for b in rendered]).double().cpu().numpy()
        for name in names
    }


def psnr(error: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of mean squared errors of pixels in 0..1."""
    return -10 * np.log10(np.maximum(error, LEAST_ERROR))


def figures(rendered: Sequence[Rendered], groups: list[str], seed: int) -> dict[str, Any]:
    """Figures of all renderings with 95 % intervals over groups of clips, and paired differences."""
    found = errors(rendered)

    def of(values: np.ndarray) -> dict[str, Any]:
        interval = bootstrap_metric_ci(lambda rows: float(values[rows].mean()), groups, seed)
        return {"mean": round(float(values.mean()), 4), "ci95": interval}

    quality = {name: psnr(error) for name, error in found.items()}
    renderings = {
        name: {"what": RENDERINGS[name], "psnr_db": of(quality[name]), "rmse": of(np.sqrt(error))}
        for name, error in found.items()
    }
    gains = {
        name: of(quality["prediction"] - values)
        for name, values in quality.items()
        if name not in ("prediction", "one_sample")
    }
    return {
        "renderings": renderings,
        "psnr_gain_of_prediction_over_db": gains,
        "deviation": deviation_figures(rendered, of),
    }


def deviation_figures(rendered: Sequence[Rendered], of: Any) -> dict[str, Any]:
    """How far samples differ, and whether they differ where their mean is wrong."""
    spreads: dict[str, list[float]] = {"given_prediction": [], "given_nothing": []}
    likeness = []
    for batch in rendered:
        for i in range(len(batch.clean)):
            kept = batch.prediction.weight[i] > 0
            spread = batch.samples[i].std(0)[kept]
            spreads["given_prediction"].append(float(spread.square().mean().sqrt()))
            without = batch.without[i].std(0)[kept]
            spreads["given_nothing"].append(float(without.square().mean().sqrt()))
            error = (batch.means["prediction"][i] - batch.clean[i]).abs()[kept]
            both = torch.stack([spread.mean(-1), error.mean(-1)])
            likeness.append(float(torch.corrcoef(both)[0, 1].nan_to_num()) if both.shape[1] > 2 else 0.0)
    return {
        **{name: of(np.array(values)) for name, values in spreads.items()},
        "correlation_with_error": of(np.array(likeness)),
    }


def decoder_verdict(found: dict[str, Any]) -> list[str]:
    """The figures in words, a line each."""
    lines = []
    for name, gain in found["psnr_gain_of_prediction_over_db"].items():
        low, high = gain["ci95"]
        word = "better than" if low > 0 else "worse than" if high < 0 else "no different from"
        what = RENDERINGS[name]
        lines.append(f"prediction {gain['mean']:+.2f} dB [{low:+.2f}, {high:+.2f}]: {word} {what}")
    return lines


def to_frames(video: Tensor) -> np.ndarray:
    """Pixels f32 [3, T, H, W] in 0..1 as u8 [T, H, W, 3]."""
    return rearrange((255 * video.clamp(0, 1)).round().byte(), "c t h w -> t h w c").cpu().numpy()


def clip_panels(batch: Rendered, number: int) -> list[VideoPanel]:
    """The panels of a clip of a batch: truth, what the encoder sees, samples, their mean and deviation."""
    prediction = batch.prediction
    grid = prediction.grid
    one = slice(number, number + 1)
    kept = prediction.weight[number] > 0
    ids = prediction.ids[one][:, kept]
    truth = to_unit_range(prediction.video[one])
    grey = torch.full_like(truth, HIDDEN_GREY / 255)
    context = prediction.context[one]
    seen_patches = gather_visible(truth, context, grid)
    seen = paste_patches(grey, seen_patches, context, grid)
    last = int(torch.cat([context.flatten(), ids.flatten()]).max()) // (grid.h * grid.w) + 1
    frames = last * (truth.shape[2] // grid.t)
    hidden_slices = torch.bincount(ids.flatten() // (grid.h * grid.w), minlength=grid.t) > 0
    marked = hidden_slices.repeat_interleave(truth.shape[2] // grid.t)[:frames].cpu().numpy()

    def panel(name: str, video: Tensor, is_rendered: bool = True) -> VideoPanel:
        shown = enlarge(to_frames(video[0])[:frames], smooth=True)
        if is_rendered and not marked.all():
            shown = mark_frames(shown, marked, PREDICTED_EDGE)
        return VideoPanel(name, shown)

    def filled(name: str, patches: Tensor) -> VideoPanel:
        return panel(name, paste_patches(seen, patches[one][:, kept], ids, grid))

    samples = batch.samples[:, :SHOWN_SAMPLES].unbind(1)
    panels = [panel("truth", truth, False), panel(SEEN, seen, False)]
    panels += [filled(f"sample {i + 1}\n", patches) for i, patches in enumerate(samples)]
    panels += [filled("mean of\nsamples", batch.means["prediction"])]
    panels += [panel("deviation of\nsamples", deviation_map(batch, one, kept, ids, truth))]
    panels += [filled("mean, given\nnothing", batch.means["nothing"])]
    panels += [filled("last visible\nframe, copied", batch.means["last_frame"])]
    if "own" in batch.means:
        panels.append(filled("the run's own\npixels", batch.means["own"]))
    return panels


def gather_visible(video: Tensor, context: Tensor, grid: Grid) -> Tensor:
    """The visible patches f32 [B, Nc, P] of a video f32 [B, 3, T, H, W]."""
    return gather_tokens(flat_patches(video, grid), context)


def deviation_map(batch: Rendered, one: slice, kept: Tensor, ids: Tensor, video: Tensor) -> Tensor:
    """The deviation of the samples of a clip at each pixel as colours f32 [1, 3, T, H, W], dark where nothing
    is rendered. Bright is a quarter of the range of pixels."""
    spread = batch.samples[one].std(1)[:, kept]
    blank = torch.zeros_like(video)
    volume = paste_patches(blank, spread, ids, batch.prediction.grid).mean(1)[0]
    colours = colormaps["inferno"]((volume / 0.25).clamp(0, 1).cpu().numpy())[..., :3]
    return rearrange(torch.from_numpy(colours).float(), "t h w c -> 1 c t h w")


def still_row(row: PanelRow) -> PanelRow:
    """The last frame of each panel, which is predicted; of the encoder's input the one that shows most."""
    panels = []
    for panel in row.panels:
        hidden = (panel.frames == HIDDEN_GREY).all(-1).sum((1, 2))
        number = int(hidden.argmin()) if panel.name == SEEN else len(panel.frames) - 1
        panels.append(panel._replace(frames=panel.frames[number : number + 1]))
    return PanelRow(row.name, panels)


def decoded_rows(rendered: Sequence[Rendered], shown: int) -> list[PanelRow]:
    """A row of panels for each of the first clips."""
    places = [(batch, i) for batch in rendered for i in range(len(batch.clean))]
    return [PanelRow("", clip_panels(batch, number)) for batch, number in places[:shown]]
