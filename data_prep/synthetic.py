"""Renders a small labelled corpus of H.264 files whose motion label cannot be told from a single frame.

    vidssl synthetic OUT [--train 3000] [--test 800]

Each video shows two textured objects of one colour (the *appearance* label: 6 colours) and any shape, which
both move in the same way (the *motion* label: 10 classes) over a still, random background. An object that
moves out of the frame is wholly out of sight before it enters on the other side.

The contents of a frame are independent of the motion label by construction: a position is a function of the
size and of a phase for each axis (see `center_at`), which motion shifts around a circle and which is uniform
in every frame; sizes grow or shrink around a cycle and are log-uniform in every frame; angles are uniform in
every frame. Eight classes are four pairs that are each other's time reversal, and so are the two orders of
events.

The ground truth of each video is `truth/KEY.npz` (no pickles), for its n objects: `masks` u8 packed bits of
[T, n, H, W] (visible pixels of each object) with `masks_shape` i64 [4], `position` f32 [T, n, 2] (x, y of the
center; pixels, also outside of the frame), `size` f32 [T, n] (radius; pixels), `angle` f32 [T, n] (radians),
`shape` i64 [n] (index into SHAPES), `depth` i64 [n] (0 is the nearest, which occludes the others). For dense
evaluation: `depth_map` u8 [T, H, W] (1 + `depth` of the visible object, 3: background), and four key points
per object: `keypoints` f64 [T, 8, 2] (x, y; pixels from the center of the upper left pixel),
`keypoints_visible` bool [T, 8], `keypoints_scale` f64 [T, 8] (diameter of the object; pixels).
"""

import argparse
import colorsys
import csv
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange

from data_prep.x264 import x264_options
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import atomic_write, check_writable, claim_folder, make_folder
from vidssl.core.launch import check_one_process
from vidssl.core.progress import track
from vidssl.data.isolation import detach_from_parent

SIDE = 48  # pixels, of a frame
FRAMES = 24
FPS = 12
OBJECTS = 2  # of a video: of one, too much would be out of sight
RADIUS = (7.0, 14.0)  # pixels; sizes are log-uniform in this range
REACH = 1.2  # radii; no shape is larger
UNSEEN = 4.0  # pixels on either side of the frame in which an object is out of sight
HURRY = 4.0  # times faster outside of the frame than in it, so that no object is away for long
MOTIONS = (
    "right",
    "left",
    "up",
    "down",
    "clockwise",
    "anticlockwise",
    "approach",
    "retreat",
    "slide_then_spin",
    "spin_then_slide",
)
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # evenly spaced on the colour circle
SHAPES = ("disc", "square", "triangle", "ring", "cross", "star")
KEYPOINTS = np.array([(0.6, 0), (0, 0.6), (-0.6, 0), (0, -0.6)])  # x, y in an object's own frame, in radii


class Track(NamedTuple):
    """Trajectories of n objects over T frames."""

    position: np.ndarray  # f32 [T, n, 2]  x, y in pixels
    size: np.ndarray  # f32 [T, n]     radius in pixels
    angle: np.ndarray  # f32 [T, n]     radians, clockwise on the screen (y points down)


def path_length(size: np.ndarray) -> np.ndarray:
    """Pixels from one end of the path of objects' centers to the other, as far as they would come in the same
    time in the frame. size: radius in pixels, any shape."""
    return SIDE + 2 * (REACH * size + UNSEEN) / HURRY


def center_at(phase: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Coordinates of centers in pixels at phases in 0..1 of the path; both any shape, size: radius in pixels.
    Objects are out of sight at both ends, and quick outside of the frame."""
    at = phase * path_length(size) - path_length(size) / 2  # from the middle of the path
    inside = at.clip(-SIDE / 2, SIDE / 2)
    return SIDE / 2 + inside + HURRY * (at - inside)


def make_tracks(motion: str, n: int, rng: np.random.Generator) -> Track:
    """Returns trajectories of n objects; the distribution of a single frame is the same for every motion."""
    t = np.arange(FRAMES)[:, None]
    speed = rng.uniform(1.4, 2.4, n)  # pixels per frame, in the frame
    spin = rng.uniform(0.16, 0.28, n)  # radians per frame
    growth = rng.uniform(0.03, 0.045, n)  # fraction of the size cycle per frame
    shift = np.zeros((FRAMES, n, 2))  # pixels
    rotation = np.zeros((FRAMES, n))  # radians
    grown = np.zeros((FRAMES, n))  # fraction of the size cycle
    half = FRAMES // 2
    if motion in ("right", "left", "up", "down"):
        direction = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}[motion]
        shift = (t * speed)[..., None] * np.array(direction)
    elif motion in ("clockwise", "anticlockwise"):
        rotation = t * spin * (1 if motion == "clockwise" else -1)
    elif motion in ("approach", "retreat"):
        grown = t * growth * (1 if motion == "approach" else -1)
    else:  # two events; their directions are random, so that only the order tells the classes apart
        first = np.minimum(t, half)
        second = np.maximum(t - half, 0)
        sliding, spinning = (first, second) if motion == "slide_then_spin" else (second, first)
        heading = rng.uniform(0, 2 * np.pi)
        shift = (sliding * speed)[..., None] * np.array([np.cos(heading), np.sin(heading)])
        rotation = spinning * spin * rng.choice([-1, 1])
    cycle = (rng.uniform(0, 1, n) + grown) % 1
    size = RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** cycle
    phase = (rng.uniform(0, 1, (n, 2)) + shift / path_length(size)[..., None]) % 1
    return Track(
        center_at(phase, size[..., None]).astype(np.float32),
        size.astype(np.float32),
        ((rng.uniform(0, 2 * np.pi, n) + rotation) % (2 * np.pi)).astype(np.float32),
    )


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside) of points (x, y), any array shape, to an outline; all in radii."""
    r, a = np.hypot(x, y), np.arctan2(y, x)
    if shape == "disc":
        return r - 0.95
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.82
    if shape == "triangle":
        return np.maximum.reduce([x * np.cos(k) + y * np.sin(k) for k in (0.5, 2.5944, 4.6888)]) - 0.55
    if shape == "ring":
        return abs(r - 0.7) - 0.28
    if shape == "cross":
        return np.minimum(np.maximum(abs(x) - 1, abs(y) - 0.33), np.maximum(abs(x) - 0.33, abs(y) - 1))
    return (r - (0.68 + 0.34 * np.cos(5 * a))) * 0.7  # star


def texture(kind: int, phase: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A pattern in [0, 1] fixed to the object; none is symmetric under rotation, so any spin is visible."""
    if kind == 0:
        return 0.5 + 0.5 * np.sign(np.sin(5 * x + phase))  # stripes
    if kind == 1:
        return (np.sin(6 * x + phase) * np.sin(4 * y) > 0).astype(np.float32)  # uneven checks
    if kind == 2:
        return np.clip(0.5 + 0.7 * x, 0, 1)  # a ramp
    return (np.hypot(x - 0.45, y) < 0.45).astype(np.float32)  # a spot off the centre


def background(rng: np.random.Generator) -> np.ndarray:
    """f32 [H, W, 3] in 0..1: smooth noise, a ramp and sometimes stripes, between two similar colours."""
    cells = int(rng.integers(2, 9))
    noise = rng.uniform(0, 1, (cells + 1, cells + 1))
    points = np.linspace(0, cells, SIDE)
    rows = np.stack([np.interp(points, np.arange(cells + 1), row) for row in noise])
    field = np.stack([np.interp(points, np.arange(cells + 1), column) for column in rows.T], 1)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    heading = rng.uniform(0, 2 * np.pi)
    along = np.cos(heading) * x + np.sin(heading) * y
    field = 0.6 * field + 0.4 * (along - along.min()) / np.ptp(along)
    if rng.uniform() < 0.4:
        field = 0.7 * field + 0.3 * (np.sin(along * rng.uniform(15, 50)) > 0)
    a = rng.uniform(0.1, 0.7, 3)
    b = a + rng.uniform(-0.25, 0.25, 3)
    return (a + field[..., None] * (b - a)).astype(np.float32)


def object_colours(colour: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A light and a dark tone, f32 [3] in 0..1 each, within 1/32 of the colour circle on either side of
    `colour`."""
    hue = COLOURS.index(colour) / len(COLOURS) + rng.uniform(-1, 1) / 32
    light = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 1), rng.uniform(0.75, 1))
    dark = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 1), rng.uniform(0.1, 0.4))
    return np.array(light), np.array(dark)


def render(
    motion: str, colour: str, rng: np.random.Generator, shape: str | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns one video u8 [T, H, W, 3] and its ground truth (see the module). shape: of all objects (None:
    random)."""
    shapes = rng.integers(0, len(SHAPES), OBJECTS)
    if shape is not None:
        shapes = np.full(OBJECTS, SHAPES.index(shape))
    track = make_tracks(motion, OBJECTS, rng)
    frames = np.broadcast_to(background(rng), (FRAMES, SIDE, SIDE, 3)).copy()
    masks = np.zeros((FRAMES, OBJECTS, SIDE, SIDE), bool)
    for i in range(OBJECTS):  # from the farthest to the nearest
        x, y = object_coordinates(track, i)
        distance = shape_distance(SHAPES[shapes[i]], x, y) * track.size[:, i, None, None]
        coverage = np.clip(0.5 - distance, 0, 1)  # antialiased over one pixel
        light, dark = object_colours(colour, rng)
        pattern = texture(int(rng.integers(4)), float(rng.uniform(0, 6)), x, y)[..., None]
        frames += coverage[..., None] * (dark + pattern * (light - dark) - frames)
        masks[:, :i] &= ~(coverage > 0.5)[:, None]
        masks[:, i] = coverage > 0.5
    frames += rng.normal(0, 0.01, frames.shape)
    truth = {
        "masks": np.packbits(masks),
        "masks_shape": np.array(masks.shape),
        "shape": shapes,
        "depth": np.arange(OBJECTS)[::-1].copy(),
        "depth_map": depth_map(masks),
        **track._asdict(),
        **keypoints(track, masks),
    }
    return (frames.clip(0, 1) * 255).round().astype(np.uint8), truth


def depth_map(masks: np.ndarray) -> np.ndarray:
    """Visible pixels bool [T, n, H, W] of objects, the farthest first -> u8 [T, H, W]; see the module."""
    background_level = OBJECTS + 1
    levels = np.arange(masks.shape[1], 0, -1) - background_level
    return (background_level + (masks * levels[:, None, None]).sum(1)).astype(np.uint8)


def keypoints(track: Track, masks: np.ndarray) -> dict[str, np.ndarray]:
    """Points fixed to the objects, which masks bool [T, n, H, W] show; see the module."""
    frames, n, height, width = masks.shape
    cos, sin = np.cos(track.angle[..., None]), np.sin(track.angle[..., None])
    x, y = KEYPOINTS.T
    rotated = np.stack([cos * x - sin * y, sin * x + cos * y], -1)
    xy = track.position[:, :, None] + track.size[..., None, None] * rotated.astype(np.float64)
    pixel = np.rint(xy).astype(int)
    nearest = pixel.clip(0, (width - 1, height - 1))
    column, row = np.moveaxis(nearest, -1, 0)
    frame, owner = np.ogrid[:frames, :n]
    shown = masks[frame[..., None], owner[..., None], row, column]
    visible = (pixel == nearest).all(-1) & shown
    scale = np.broadcast_to(2.0 * track.size[..., None], visible.shape)
    arrays = {"keypoints": xy, "keypoints_visible": visible, "keypoints_scale": scale}
    return {name: rearrange(array, "t n k ... -> t (n k) ...") for name, array in arrays.items()}


def object_coordinates(track: Track, i: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of every pixel in the frame of object i, in radii: f32 [T, H, W] each."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    dx, dy = (pixels - track.position[:, i, k, None, None] for k, pixels in enumerate((columns, rows)))
    cos, sin = np.cos(track.angle[:, i, None, None]), np.sin(track.angle[:, i, None, None])
    radius = track.size[:, i, None, None]
    return (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius


def write_video(path: Path, frames: np.ndarray, fps: int = FPS, crf: int = 18) -> None:
    """Writes frames u8 [T, H, W, 3] as an H.264 file, yuv420p; equal frames give equal bytes (see
    data_prep.x264)."""
    import av  # imported here, so that mistakes are answered without it

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=x264_options(crf, "veryfast"))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_example(job: tuple[Path, str, str, str, tuple[int, ...]]) -> None:
    """Renders and writes one video and its ground truth. job: (out, key, motion, colour, seed)."""
    out, key, motion, colour, seed = job
    frames, truth = render(motion, colour, np.random.default_rng(seed))
    write_video(out / "videos" / f"{key}.mp4", frames)
    np.savez_compressed(out / "truth" / f"{key}.npz", **truth)  # type: ignore[arg-type]


def make_corpus(
    out: Path, train: int, test: int, labelled: int | None = None, seed: int = 0, workers: int = 2
) -> None:
    """Writes train + test videos, their ground truth and labels.csv; classes are balanced over motion x
    colour.

    labelled: number of train videos that have labels in labels.csv, the first ones (None: all).
    """
    if min(train, test, labelled or 0, seed) < 0 or workers < 1:
        raise UserError("--workers must be positive, --train, --test, --labelled and --seed >= 0")
    check_writable(out)
    if os.path.exists(out / "labels.csv"):
        raise UserError(f"{out} already holds a corpus: give another folder, or remove it")
    for name in ("videos", "truth"):
        make_folder(out / name)
    rows: list[tuple[str, ...]] = []
    jobs = []
    for split_number, (split, count) in enumerate((("train", train), ("test", test))):
        for i in range(count):
            motion = MOTIONS[i % len(MOTIONS)]
            colour = COLOURS[i // len(MOTIONS) % len(COLOURS)]
            key = f"{split}_{i:05d}"
            has_label = split == "test" or labelled is None or i < labelled
            labels = (motion, colour) if has_label else ("", "")
            rows.append((f"videos/{key}.mp4", *labels, split))
            jobs.append((out, key, motion, colour, (seed, split_number, i)))
    with ProcessPoolExecutor(workers, get_context("fork"), detach_from_parent, (os.getpid(),)) as pool:
        start_workers(pool)
        try:
            list(track(pool.map(write_example, jobs, chunksize=8), "render", "videos", len(jobs)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for queued videos
    # last, and whole or not at all: a folder that has it is complete
    atomic_write(out / "labels.csv", lambda temporary: write_labels(temporary, rows))


def start_workers(pool: ProcessPoolExecutor) -> None:
    """Forks the workers, which leave Ctrl-C and SIGTERM to their parent: both may come to all processes, and
    one that comes in a fork could be lost in a hook of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        pool.submit(os.getpid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def write_labels(path: Path, rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([("path", "label_motion", "label_appearance", "split"), *rows])


def main(argv: list[str]) -> None:
    check_one_process(argv)
    parser = argparse.ArgumentParser(prog="vidssl synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--train", type=int, default=3000, help="number of training videos")
    parser.add_argument("--test", type=int, default=800, help="number of test videos")
    parser.add_argument("--labelled", type=int, help="number of training videos with labels; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="number of processes")
    args = parser.parse_args(argv)
    check_writable(args.out)
    with claim_folder(args.out, "synthetic"):
        make_corpus(**vars(args))


if __name__ == "__main__":
    run_cli(main)
