"""The pictures of `vidssl show`: reads files, calls the functions that draw, writes the picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidssl import config
from vidssl.config import SHIPPED, load_config
from vidssl.core.errors import DecodeError, UserError
from vidssl.data.augment import downscale
from vidssl.data.dataset import ClipReader
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.shards import Sample, Shards
from vidssl.data.timing import choose_frames, draw_timing
from vidssl.evaluation.probe_data import encoder_view
from vidssl.model.grid import Grid
from vidssl.pictures.attention import attention_video, open_probe, predicted_class, query_attention
from vidssl.pictures.clips import ShownClip, open_file, playing_rate, read_frames, read_windows
from vidssl.pictures.features import (
    liveliest_token,
    pca_videos,
    similarity_video,
    token_features,
)
from vidssl.pictures.formats import is_animated
from vidssl.pictures.panels import PanelRow, VideoPanel, enlarge, stamp_times, write_panels
from vidssl.pretrained.external import open_encoder
from vidssl.pretrained.load import LoadedEncoder, load_encoder
from vidssl.training.schema import TrainConfig

CLIP_SIDE = 192  # pixels, the largest short side of the frames of show_clip and show_augment
STILL_CLIP_FRAMES = 16  # of show_clip as a still picture, in rows of FRAMES_A_ROW
FRAMES_A_ROW = 8
PLAYED_FRAMES = 96  # of a video that plays, at most
SHARD_SIDE = 96  # pixels, height of a clip of show_shards
SHARD_FRAMES = 12
CLIPS_A_ROW = 6
SHARD_FPS = 6.0
FILLED_IN = ("run.out=x", "run.steps=1", "run.batch=8", "data.train=x")  # of no matter for a clip


def show_clip(video: Path, out: Path) -> None:
    """Frames of a video as the loader decodes them, with their times; all of a short one if they play."""
    with open_file(video) as opened:
        wanted = PLAYED_FRAMES if is_animated(out) else STILL_CLIP_FRAMES
        count = min(wanted, len(opened))
        indices = np.linspace(0, len(opened) - 1, count).round().astype(int)
        frames = read_frames(opened, indices, video)
        times = opened.times[indices]
        height, width = opened.size
        facts = f"{video.name}   {width}x{height} px, {len(opened)} frames, {opened.times[-1]:.2f} s"
        facts += f", decoded by {opened.decoder}"
    texts = [f"{time:.2f} s  #{index}" for time, index in zip(times, indices, strict=True)]
    frames = stamp_times(_fitted(frames, CLIP_SIDE), texts)
    if is_animated(out):
        rows = [PanelRow("", [VideoPanel(facts, frames)])]
    else:
        parts = [frames[i : i + FRAMES_A_ROW] for i in range(0, len(frames), FRAMES_A_ROW)]
        rows = [PanelRow(facts if i == 0 else "", [VideoPanel("", part)]) for i, part in enumerate(parts)]
    write_panels(out, rows, playing_rate(times), frames.shape[1])


def show_augment(arguments: Sequence[str], clip: Path, draws: int, out: Path) -> None:
    """Several draws of the clip of a video along time, and of its augmentation, as a training makes them."""
    cfg = training_config(arguments)
    augment = cfg.augment.build().for_clip(
        cfg.data.frames, clip.suffix.lstrip(".").lower() in IMAGE_EXTENSIONS
    )
    panels = []
    with open_file(clip) as video:
        times = video.times
        count = min(PLAYED_FRAMES, len(video))
        whole = np.linspace(0, len(video) - 1, count).round().astype(int)
        panels.append(VideoPanel("the video", _fitted(read_frames(video, whole, clip), CLIP_SIDE)))
        for draw in range(draws):
            rng = np.random.default_rng((cfg.run.seed, draw))
            timing = draw_timing(cfg.data, rng)
            indices = choose_frames(times, cfg.data, timing, augment.one_frame)
            frames = downscale(read_frames(video, indices, clip), cfg.data.short_side)
            drawn = augment(frames, rng).permute(1, 2, 3, 0).numpy()
            note = f"{times[indices[0]]:.2f} to {times[indices[-1]]:.2f} s"
            panels.append(VideoPanel(f"draw {draw + 1}", enlarge(drawn, CLIP_SIDE, smooth=True), note))
    write_panels(out, [PanelRow("", panels)], playing_rate(times[indices]), CLIP_SIDE)


def training_config(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of a run's folder, or of files and key=value arguments; what they leave out and does
    not matter for a clip is filled in."""
    if len(arguments) == 1 and (run := Path(arguments[0]) / "config.yaml").is_file():
        return load_config([str(run)], TrainConfig)
    tree, _ = config.merge(list(arguments))
    filled = [text for text in FILLED_IN if not _has_key(tree, text.split("=")[0])]
    for section, file in (("method", "method/videomae_tiny"), ("model", "model/vit_micro")):
        if section not in tree:
            filled.insert(0, str(SHIPPED / f"{file}.yaml"))
    return load_config([*filled, *arguments], TrainConfig)


def _has_key(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def show_shards(folder: Path, clips: int, out: Path) -> None:
    """Evenly spaced samples of a packed data set: middle frames, labels, keys."""
    shards = Shards([str(folder)])
    samples = shards.list_samples()
    chosen = np.linspace(0, len(samples) - 1, min(clips, len(samples))).round().astype(int)
    reader = ClipReader(shards)
    panels = [_sample_panel(reader, samples[number], shards.classes) for number in chosen]
    write_panels(out, list(montage(panels)), SHARD_FPS, SHARD_SIDE)


def montage(panels: Sequence[VideoPanel]) -> Iterator[PanelRow]:
    """Rows of CLIPS_A_ROW panels."""
    for first in range(0, len(panels), CLIPS_A_ROW):
        yield PanelRow("", list(panels[first : first + CLIPS_A_ROW]))


def _sample_panel(reader: ClipReader, sample: Sample, classes: dict[str, list[str]]) -> VideoPanel:
    title = label_text(sample, classes)
    try:
        frames = reader.read(sample, lambda video: video.get(_spread_frames(len(video))))
    except DecodeError as e:
        return VideoPanel(title, np.full((1, SHARD_SIDE, SHARD_SIDE, 3), 128, np.uint8), e.reason)
    return VideoPanel(title, _of_height(frames, SHARD_SIDE), sample.key)


def _spread_frames(count: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(SHARD_FRAMES, count)).round().astype(int)


def label_text(sample: Sample, classes: dict[str, list[str]]) -> str:
    """The classes of a sample, of all label sets."""
    texts = []
    for label_set, number in sample.meta.get("labels", {}).items():
        numbers = number if isinstance(number, list) else [number]
        texts += [classes[label_set][n] for n in numbers if n >= 0]
    return ", ".join(texts) or "no label"


def show_features(
    encoder: str,
    videos: Sequence[Path],
    out: Path,
    windows: int = 4,
    token: tuple[int, int, int] | None = None,
    **view_options: Any,
) -> None:
    """Principal components of features as colours, with one basis for all videos, beside those of the same
    encoder untrained, and the similarity of a token to all others."""
    loaded = open_encoder(encoder, frames=view_options.get("frames"), size=view_options.get("size"))
    view = encoder_view(loaded, 1, 1, **view_options)
    clips = [read_windows(path, view, windows) for path in videos]
    rows = [PanelRow(clip.name, [VideoPanel("video", _smooth(clip.frames))]) for clip in clips]
    for name, one in shown_encoders(encoder, loaded).items():
        features = token_features(one, torch.cat([clip.tensor() for clip in clips]))
        by_clip = features.split([clip.windows for clip in clips])
        colours = pca_videos(features, view.frames, rows[0].panels[0].frames.shape[1])
        place = 0
        for row, clip, own in zip(rows, clips, by_clip, strict=True):
            video = np.concatenate(colours[place : place + clip.windows])
            place += clip.windows
            row.panels.append(VideoPanel(f"features,\n{name}", video))
            if name != "untrained":
                row.panels.append(_similarity_panel(name, clip, own, token))
    write_panels(out, rows, max(clip.fps for clip in clips))


def shown_encoders(source: str, loaded: LoadedEncoder) -> dict[str, LoadedEncoder]:
    """Name -> encoder: of a run with an average both, and the same architecture untrained."""
    online = Path(source) / "encoder_online.safetensors"
    shown = {"encoder": loaded}
    if online.is_file():
        shown = {"EMA target": loaded, "online": load_encoder(online)}
    if ":" not in source:
        shown["untrained"] = load_encoder(source, random_init=0)
    return shown


def _similarity_panel(
    name: str, clip: ShownClip, features: Tensor, token: tuple[int, int, int] | None
) -> VideoPanel:
    """features: f32 [windows, t, h, w, D] of the clip."""
    joined = features.flatten(0, 1)
    grid = Grid(*joined.shape[:3])
    if token is not None and not all(0 <= i < n for i, n in zip(token, grid, strict=True)):
        raise UserError(
            f"--token {','.join(map(str, token))}: {clip.name} has {grid.t} slices of {grid.h} x {grid.w} "
            "tokens, counted from 0"
        )
    chosen = token or liveliest_token(clip.frames, grid)
    return VideoPanel(f"like the token,\n{name}", similarity_video(_smooth(clip.frames), joined, chosen))


def show_attention(
    probe: Path, videos: Sequence[Path], out: Path, label: str | None = None, windows: int = 4
) -> None:
    """Where the query of an attentive probe looks, and what the head predicts."""
    saved, loaded, view = open_probe(probe, label)
    rows = []
    clips = [read_windows(path, view, windows) for path in videos]
    for clip in clips:
        features = token_features(loaded, clip.tensor())
        weights = query_attention(saved, features)
        joined = weights.permute(1, 0, 2, 3, 4).flatten(1, 2)
        panels = [
            VideoPanel("video", _smooth(clip.frames), predicted_class(saved, features)),
            VideoPanel(f"attention ({saved.label})", attention_video(_smooth(clip.frames), joined)),
        ]
        rows.append(PanelRow(clip.name, panels))
    write_panels(out, rows, max(clip.fps for clip in clips))


def _smooth(frames: np.ndarray) -> np.ndarray:
    return enlarge(frames, smooth=True)


def _fitted(frames: np.ndarray, side: int) -> np.ndarray:
    """Frames u8 [T, H, W, 3] whose short side is at most `side` pixels."""
    return downscale(frames, side) if min(frames.shape[1:3]) > side else frames


def _of_height(frames: np.ndarray, height: int) -> np.ndarray:
    """Frames u8 [T, H, W, 3] scaled to a height, with their aspect ratio."""
    width = max(1, round(frames.shape[2] * height / frames.shape[1]))
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in frames]
    return np.stack([np.asarray(image) for image in resized])
