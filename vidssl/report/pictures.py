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
from vidssl.data.shards import Sample, Shards
from vidssl.data.timing import middle_rate
from vidssl.evaluation.views import EvalClips, View
from vidssl.model.grid import Grid, Mask, gather_tokens
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.objective import Objective
from vidssl.objective.targets import Pixels
from vidssl.pictures.features import encode_on_grid, heat_over, pca_videos
from vidssl.pictures.masks import to_pixels
from vidssl.pictures.panels import HIDDEN_GREY
from vidssl.pictures.reconstruction import paste_patches, predicted_pixels, to_unit_range
from vidssl.pictures.runs import draw_mask, masked_prediction_of, predict_mask
from vidssl.report.contents import resolve_data
from vidssl.report.run_files import RunFiles
from vidssl.report.strips import Group, group, item, strip
from vidssl.training.checkpoint import list_checkpoints, read_checkpoint, step_of
from vidssl.training.schema import TrainConfig

RUNS = 4  # of a page that have pictures
CLIPS = 4  # of each run
CHECKPOINTS = 3  # beside the untrained objective
QUERIES = 5
SEARCHED = 96  # clips of train in which neighbours are sought
NEIGHBOURS = 5


class ReportClip(NamedTuple):
    """A clip that is shown."""

    key: str
    label: str  # its classes
    clip: Tensor  # u8 [3, T, S, S]

    @property
    def frames(self) -> np.ndarray:
        """u8 [T, S, S, 3]"""
        return rearrange(self.clip, "c t h w -> t h w c").numpy()


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
        state = [(run.name, list_checkpoints(run.folder / "checkpoints")) for run in runs]
        if state != self.state:
            self.groups = make_pictures(runs)
            self.state = state
        return self.groups


def make_pictures(runs: Sequence[RunFiles]) -> list[Group]:
    """The groups of pictures of a page, each with what is missing in it."""
    masks = group("masks", "Masks and predictions", "What the encoder sees, what is predicted, and how well.")
    features = group(
        "pca", "Features as colours", "The first three principal components of the tokens, one basis a run."
    )
    alike = group("neighbours", "Nearest neighbours", "Clips of train whose mean features are most alike.")
    for run in runs[:RUNS]:
        try:
            add_run(run, masks, features, alike)
        except UserError as e:
            masks["missing"].append(f"{run.name}: {e}")
    if len(runs) > RUNS:
        masks["missing"].append(f"Only the first {RUNS} runs have pictures.")
    return [found for found in (masks, features, alike) if found["items"] or found["missing"]]


def add_run(run: RunFiles, masks: Group, features: Group, alike: Group) -> None:
    """Adds the pictures of a run. Raises UserError if it cannot be built or its data are not found."""
    if not run.section("method"):
        raise UserError("has no section `method`, so there is nothing to draw")
    cfg = load_config([str(run.folder / "config.yaml")], TrainConfig)
    train, test = open_data(run)
    stages = load_stages(run.folder, cfg)
    samples = spread_samples(test, CLIPS + QUERIES)
    shown = read_clips(cfg, test, samples)
    last = stages[-1]
    for i, clip in enumerate(shown[:CLIPS]):
        if last.prediction is None:
            break
        masks["items"].append(mask_item(run.name, clip, i, stages, cfg.run.seed))
    if last.prediction is None:
        masks["missing"].append(f"{run.name}: its method predicts nothing behind a mask.")
    features["items"] += feature_items(run.name, shown[:CLIPS], stages)
    gallery = read_clips(cfg, train, spread_samples(train, SEARCHED))
    alike["items"] += neighbour_items(run.name, shown[-QUERIES:], gallery, last)


def open_data(run: RunFiles) -> tuple[Shards, Shards]:
    """The shards of train, and those of test beside them (else the same)."""
    named = run.section("data").get("train") or []
    first = str(named if isinstance(named, str) else named[0]) if named else ""
    folder = resolve_data(run, first)
    if folder is None:
        raise UserError(f"data.train {first}: no shards there, so no pictures of clips")
    test = folder.with_name("test")
    has_test = folder.name == "train" and (test / "index.json").is_file()
    train_shards = Shards([str(folder)])
    return train_shards, Shards([str(test)]) if has_test else train_shards


def spread_samples(shards: Shards, count: int) -> list[Sample]:
    """At most `count` samples, evenly spaced."""
    samples = shards.list_samples()
    numbers = np.unique(np.linspace(0, len(samples) - 1, count).round().astype(int))
    return [samples[i] for i in numbers] if samples else []


def read_clips(cfg: TrainConfig, shards: Shards, samples: list[Sample]) -> list[ReportClip]:
    """The middle clips of the samples that decode."""
    stride, fps = middle_rate(cfg.data.stride, cfg.data.fps)
    arguments = cfg.encoder_arguments()
    view = View(arguments["frames"], stride, fps, segments=1, crops=1, size=arguments["height"])
    clips = EvalClips(shards, samples, view, 1)
    found = (clips[i] for i in range(len(samples)))
    return [
        ReportClip(samples[i].key, classes_text(samples[i], shards.classes), clip[0])
        for i, clip in found
        if isinstance(clip, Tensor)
    ]


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
    strips = [strip("clip", shown.frames), *mask_strips(shown.frames, mask, grid)]
    for stage in stages:
        assert stage.prediction is not None
        strips.append(strip(*predicted_video(stage, clip, mask, rng, shown.frames)))
    return item(f"{name}: {shown.key}", shown.label, strips)


def mask_strips(frames: np.ndarray, mask: Mask, grid: Grid) -> list[dict[str, Any]]:
    """What is seen, and what is predicted, of a video u8 [T, S, S, 3]."""
    target = mask.target[0] if mask.weight is None else mask.target[0][mask.weight[0] > 0]
    found = []
    for text, ids in (("seen", mask.context[0]), ("to predict", target.flatten())):
        visible = torch.zeros(grid.n, dtype=torch.bool)
        visible[ids] = True
        found.append(strip(text, np.where(to_pixels(visible, frames, grid)[..., None], frames, HIDDEN_GREY)))
    return found


def predicted_video(
    stage: Stage, clip: Tensor, mask: Mask, rng: KeyedRNG, frames: np.ndarray
) -> tuple[str, np.ndarray]:
    """A name and a video u8 [T, S, S, 3]: pixels that are predicted, pasted behind the mask, or of features
    the cosine of prediction and target, 0 dark and 1 bright."""
    part = stage.prediction
    assert part is not None
    when = "untrained" if stage.step == 0 else f"step {stage.step:,}"
    found = predict_mask(part, clip, mask, rng)
    if isinstance(part.target, Pixels):
        pixels = predicted_pixels(part.target, found.values, found.video, found.ids, found.grid)
        video = paste_patches(to_unit_range(found.video), pixels, found.ids, found.grid)
        return f"predicted, {when}", to_u8(video[0])
    target = part.target_features(found.video)
    if target is None:
        return f"no target without a mask, {when}", np.zeros_like(frames)
    true = gather_tokens(target, found.ids).float()
    # About the mean of the clip's targets, which alone would make all alike
    mean = target.float().mean(1, keepdim=True)
    cosine = F.cosine_similarity(found.values - mean, true - mean, dim=-1)[0]
    values = torch.zeros(found.grid.n).scatter(0, found.ids[0], cosine.clamp_min(0))
    text = f"cosine to target {float(cosine.mean()):.2f}, {when}"
    return text, heat_over(frames, values.reshape(found.grid), 1.0)


def to_u8(video: Tensor) -> np.ndarray:
    """f32 [3, T, S, S] in 0..1 -> u8 [T, S, S, 3]"""
    return (255 * rearrange(video, "c t h w -> t h w c").clamp(0, 1)).round().numpy().astype(np.uint8)


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
    videos = [pca_videos(encode(stage, shown), frames, size) for stage in ends]
    texts = ["untrained" if stage.step == 0 else f"step {stage.step:,}" for stage in ends]
    items = []
    for i, clip in enumerate(shown):
        strips = [strip(text, video[i], smooth=True) for text, video in zip(texts, videos, strict=True)]
        items.append(item(f"{name}: {clip.key}", clip.label, [strip("clip", clip.frames), *strips], 3))
    return items


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
            text = gallery[place].label or gallery[place].key
            strips.append(strip(f"{value:.2f}  {text}", gallery[place].frames))
        about = f"of {len(gallery)} clips; {query.label}"
        items.append(item(f"{name}: {query.key}", about, strips, columns=3))
    return items


def classes_text(sample: Sample, classes: dict[str, list[str]]) -> str:
    """The classes of a sample by their names."""
    found = []
    for label_set, number in (sample.meta.get("labels") or {}).items():
        names = classes.get(label_set, [])
        if isinstance(number, int) and 0 <= number < len(names):
            found.append(names[number])
    return ", ".join(found)
