"""Pictures of a page: what a run hides, predicts and sees in some clips, and which clips it holds alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Grid
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.objective import Objective
from vidssl.objective.targets import Pixels
from vidssl.pictures.features import (
    encode_on_grid,
    liveliest_token,
    pca_videos,
    similarity_video,
)
from vidssl.pictures.predictions import mask_videos, predicted_videos
from vidssl.pictures.runs import draw_mask, masked_prediction_of
from vidssl.pictures.strips import Group, group, item, strip
from vidssl.report.clips import ReportClip, clip_view, open_data, read_clips, spread_samples
from vidssl.report.probe_pictures import DECODED_ABOUT, add_attention, add_decoded
from vidssl.report.run_files import RunFiles
from vidssl.training.checkpoint import list_checkpoints, read_checkpoint, step_of
from vidssl.training.schema import TrainConfig

RUNS = 4  # of a page that have pictures
CLIPS = 4  # of each run
CHECKPOINTS = 3  # beside the untrained objective
QUERIES = 5
MIN_WIDTH = 8  # channels of a target whose tokens have a direction
SEARCHED = 96  # clips of train in which neighbours are sought
NEIGHBOURS = 5


class Stage(NamedTuple):
    """The objective of a run at a step of its training."""

    step: int
    objective: Objective

    @property
    def prediction(self) -> MaskedPrediction | None:
        """The part that predicts behind a mask; None: there is none."""
        return masked_prediction_of(self.objective)


class Pictures:
    """Draws the pictures of runs, again only when one has saved."""

    def __init__(self) -> None:
        self.state: Any = None
        self.groups: list[Group] = []

    def __call__(self, runs: Sequence[RunFiles]) -> list[Group]:
        """The groups of a page."""
        state = [(run.name, list_checkpoints(run.folder / "checkpoints"), further_files(run)) for run in runs]
        if state != self.state:
            self.groups = make_pictures(runs)
            self.state = state
        return self.groups


def further_files(run: RunFiles) -> list[Path]:
    """Files that add pictures when they appear."""
    return sorted([*run.folder.glob("*/decoded.json"), *run.folder.glob("*/heads/*")])


def make_pictures(runs: Sequence[RunFiles]) -> list[Group]:
    """The groups of pictures of a page, each with what is missing in it."""
    masks = group("masks", "Masks and predictions", "What the encoder sees, what is predicted, and how well.")
    features = group(
        "pca",
        "Features as colours",
        "The first three principal components of the tokens, one basis a run, scaled to what varies: where "
        "the spread (deviation over root mean square) is near 0, tokens are alike and colours show the rest.",
    )
    alike = group("neighbours", "Nearest neighbours", "Clips of train whose mean features are most alike.")
    looks = group("attention", "Attention of the probe", "Bright: where the query of its head looks.")
    decoded = group("decoded", "Decoded predictions", DECODED_ABOUT)
    for run in runs[:RUNS]:
        if run.is_fine_tuning:
            masks["missing"].append(f"{run.name}: a fine-tuning hides and predicts nothing.")
            continue
        try:
            add_run(run, masks, features, alike)
            add_attention(run, looks)
        except UserError as e:
            masks["missing"].append(f"{run.name}: {e}")
        add_decoded(run, decoded)
    if len(runs) > RUNS:
        masks["missing"].append(f"Only the first {RUNS} runs have pictures.")
    groups = (masks, decoded, features, looks, alike)
    return [found for found in groups if found["items"] or found["missing"]]


def add_run(run: RunFiles, masks: Group, features: Group, alike: Group) -> None:
    """Adds the pictures of a run. Raises UserError if it cannot be built or its data are not found."""
    if not run.section("method"):
        raise UserError("has no section `method`, so there is nothing to draw")
    cfg = load_config([str(run.folder / "config.yaml")], TrainConfig)
    train, test = open_data(run)
    stages = load_stages(run.folder, cfg)
    samples = spread_samples(test, CLIPS + QUERIES)
    view = clip_view(cfg)
    shown = read_clips(view, test, samples)
    last = stages[-1]
    for i, clip in enumerate(shown[:CLIPS]):
        if last.prediction is None:
            break
        masks["items"].append(mask_item(run.name, clip, i, stages, cfg.run.seed))
    if last.prediction is None:
        masks["missing"].append(f"{run.name}: its method predicts nothing behind a mask.")
    features["items"] += feature_items(run.name, shown[:CLIPS], stages)
    gallery = read_clips(view, train, spread_samples(train, SEARCHED))
    alike["items"] += neighbour_items(run.name, shown[-QUERIES:], gallery, last)


def load_stages(folder: Path, cfg: TrainConfig) -> list[Stage]:
    """The objective untrained and at the checkpoints that are kept, at most CHECKPOINTS of them."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    numbers = np.unique(np.linspace(0, len(checkpoints) - 1, CHECKPOINTS).round().astype(int))
    stages = [Stage(0, cfg.build_objective().eval().requires_grad_(False))]
    for number in numbers if checkpoints else ():
        try:
            state = read_checkpoint(checkpoints[number])
            objective = cfg.build_objective()
            objective.load_state_dict(state["model"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as e:
            raise UserError(f"{checkpoints[number]}: cannot be read ({str(e).splitlines()[0]})") from None
        stages.append(Stage(step_of(checkpoints[number]), objective.eval().requires_grad_(False)))
    return stages


@torch.no_grad()
def mask_item(
    name: str, shown: ReportClip, number: int, stages: Sequence[Stage], seed: int
) -> dict[str, Any]:
    """A clip with a mask, and what each stage predicts behind it."""
    clip = shown.clip[None]
    rng = KeyedRNG(seed, 0, torch.tensor([number]))
    last = stages[-1].prediction
    assert last is not None
    mask = draw_mask(last, clip, rng)
    grid = last.encoder.grid_of(normalise(clip))
    strips = [strip("clip", shown.frames)]
    strips += [strip(text, video) for text, video in mask_videos(shown.frames, mask, grid).items()]
    for stage in stages:
        assert stage.prediction is not None
        when = "untrained" if stage.step == 0 else f"step {stage.step:,}"
        text, videos = predicted_videos(stage.prediction, clip, mask, rng, [shown.frames])
        strips.append(strip(f"{text}, {when}", videos[0]))
    return item(f"{name}: {shown.name}", shown.label, strips)


@torch.no_grad()
def encode(stage: Stage, shown: Sequence[ReportClip]) -> Tensor:
    """Features f32 [n, t, h, w, D] of the evaluated encoder."""
    encoder = stage.objective.eval_encoder
    video = normalise(torch.stack([one.clip for one in shown]))
    return encode_on_grid(encoder, video, encoder.grid_of(video))


def feature_items(name: str, shown: Sequence[ReportClip], stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Clips beside their features as colours, untrained and at the last stage."""
    if not shown:
        return []
    ends = [stages[0], stages[-1]] if len(stages) > 1 else list(stages)
    frames, size = shown[0].clip.shape[1:3]
    encoded = [encode(stage, shown) for stage in ends]
    videos = [pca_videos(features, frames, size) for features in encoded]
    notes = [f"spread {spread_of_tokens(features):.2g}" for features in encoded]
    texts = ["untrained" if stage.step == 0 else f"step {stage.step:,}" for stage in ends]
    name_of_map, alike = similarity_videos(stages[-1], shown)
    items = []
    for i, clip in enumerate(shown):
        strips = [
            strip(text, video[i], smooth=True, note=note)
            for text, video, note in zip(texts, videos, notes, strict=True)
        ]
        strips = [strip("clip", clip.frames), *strips, strip(f"{name_of_map}, {texts[-1]}", alike[i])]
        items.append(item(f"{name}: {clip.name}", clip.label, strips, 2))
    return items


def spread_of_tokens(features: Tensor) -> float:
    """The deviation of all tokens f32 [n, t, h, w, D] over their root mean square."""
    deviation = features - features.mean((0, 1, 2, 3))
    return float(deviation.square().mean().sqrt() / features.square().mean().sqrt().clamp_min(1e-12))


@torch.no_grad()
def similarity_videos(stage: Stage, shown: Sequence[ReportClip]) -> tuple[str, list[np.ndarray]]:
    """For each clip the cosine of the place that moves most to all others, of what is predicted where that is
    features, else of the encoder's features; and what it is of."""
    encoder = stage.objective.eval_encoder
    video = normalise(torch.stack([one.clip for one in shown]))
    part = stage.prediction
    target = None
    if part is not None and not isinstance(part.target, Pixels):
        target = part.target_features(video)
    if part is None or target is None or target.dtype.is_complex or target.shape[-1] < MIN_WIDTH:
        name = "features like the marked token"
        maps = encode_on_grid(encoder, video, encoder.grid_of(video))
    else:
        grid = part.encoder.grid_of(video)
        name = "target like the marked token"
        maps = rearrange(target.float(), "n (t h w) k -> n t h w k", t=grid.t, h=grid.h)
    places = [liveliest_token(one.frames, Grid(*maps.shape[1:4])) for one in shown]
    return name, [similarity_video(one.frames, maps[i], places[i]) for i, one in enumerate(shown)]


def neighbour_items(
    name: str, queries: Sequence[ReportClip], gallery: Sequence[ReportClip], stage: Stage
) -> list[dict[str, Any]]:
    """Each query with the clips of the gallery whose mean tokens have the largest cosine."""
    known = {one.key for one in queries}
    gallery = [one for one in gallery if one.key not in known]
    if not queries or not gallery:
        return []
    means = encode(stage, gallery).mean((1, 2, 3))
    centre = means.mean(0)
    found = F.normalize(encode(stage, queries).mean((1, 2, 3)) - centre, dim=-1)
    cosines = found @ F.normalize(means - centre, dim=-1).T
    values, places = cosines.topk(min(NEIGHBOURS, len(gallery)))
    items = []
    for i, query in enumerate(queries):
        strips = [strip("query", query.frames)]
        for value, place in zip(values[i].tolist(), places[i].tolist(), strict=True):
            text = gallery[place].label or gallery[place].name
            strips.append(strip(f"{value:.2f}  {text}", gallery[place].frames))
        about = f"of {len(gallery)} clips; {query.label}"
        items.append(item(f"{name}: {query.name}", about, strips, columns=3))
    return items
