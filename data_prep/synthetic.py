"""A small labelled corpus of real H.264 files, whose motion label no single frame tells.

    python -m data_prep.synthetic OUT [--train 3000] [--test 800]

Each video shows one or two textured objects of one colour (the *appearance* label: 6 colours) and any shapes that all
do the same thing (the *motion* label: 10 classes) over a still, random background. What a frame shows is independent of
the motion label by construction, not by luck: positions live on a torus (an object that leaves on one side comes in at
the other) and are uniform in every frame; sizes grow or shrink around a cycle and are log-uniform in every frame;
angles are uniform in every frame. Eight classes are four pairs that are each other's time reversal, and so are the two
orders of events.

Beside each video stands its truth, `truth/KEY.npz` (no pickles): `masks` u8 packed bits of [T, n, H, W] (visible
pixels of each object), `position` f32 [T, n, 2] (x, y; pixels), `size` f32 [T, n] (radius; pixels), `angle` f32 [T, n]
(radians), `shape` i64 [n] (of SHAPES), `depth` i64 [n] (0 is nearest; nearer hides farther); the count is n.
"""

import argparse
import colorsys
import csv
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from tqdm import tqdm

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder

SIDE, FRAMES, FPS = 48, 24, 12  # pixels, frames, frames a second
OBJECTS = 2  # at most
RADIUS = (8.0, 17.0)  # pixels; sizes are log-uniform between
MOTIONS = (
    *("right", "left", "up", "down", "clockwise", "anticlockwise", "approach", "retreat"),
    *("slide_then_spin", "spin_then_slide"),
)
COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta")  # a sixth of the colour circle each
SHAPES = ("disc", "square", "triangle", "ring", "cross", "star")


class Track(NamedTuple):
    """The course of n objects over T frames."""

    position: np.ndarray  # f32 [T, n, 2]  x, y in pixels, on the torus
    size: np.ndarray  # f32 [T, n]     radius in pixels
    angle: np.ndarray  # f32 [T, n]     radians, clockwise on the screen (y points down)


def tracks(motion: str, n: int, rng: np.random.Generator) -> Track:
    """Courses of n objects that do `motion`; every single frame has the same distribution for every motion."""
    t = np.arange(FRAMES)[:, None]
    speed = rng.uniform(1.4, 2.4, n)  # pixels a frame
    spin = rng.uniform(0.16, 0.28, n)  # radians a frame
    growth = rng.uniform(0.03, 0.045, n)  # share of the size cycle a frame
    slide, turn, grow = np.zeros((FRAMES, n, 2)), np.zeros((FRAMES, n)), np.zeros((FRAMES, n))
    half = FRAMES // 2
    if motion in ("right", "left", "up", "down"):
        way = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}[motion]
        slide = (t * speed)[..., None] * np.array(way)
    elif motion in ("clockwise", "anticlockwise"):
        turn = t * spin * (1 if motion == "clockwise" else -1)
    elif motion in ("approach", "retreat"):
        grow = t * growth * (1 if motion == "approach" else -1)
    else:  # two events in turn; their directions are free, so that only the order tells
        first, second = np.minimum(t, half), np.maximum(t - half, 0)
        moving, turning = (first, second) if motion == "slide_then_spin" else (second, first)
        heading = rng.uniform(0, 2 * np.pi)
        slide = (moving * speed)[..., None] * np.array([np.cos(heading), np.sin(heading)])
        turn = turning * spin * rng.choice([-1, 1])
    cycle = (rng.uniform(0, 1, n) + grow) % 1
    return Track(
        ((rng.uniform(0, SIDE, (n, 2)) + slide) % SIDE).astype(np.float32),
        (RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** cycle).astype(np.float32),
        ((rng.uniform(0, 2 * np.pi, n) + turn) % (2 * np.pi)).astype(np.float32),
    )


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance (negative inside), in radii, of points given in an object's own frame, any array shape."""
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
    """A pattern in [0, 1] fixed to the object; never symmetric under rotation, so that a spin shows on every shape."""
    if kind == 0:
        return 0.5 + 0.5 * np.sign(np.sin(5 * x + phase))  # stripes
    if kind == 1:
        return (np.sin(6 * x + phase) * np.sin(4 * y) > 0).astype(np.float32)  # uneven checks
    if kind == 2:
        return np.clip(0.5 + 0.7 * x, 0, 1)  # a ramp
    return (np.hypot(x - 0.45, y) < 0.45).astype(np.float32)  # a spot off the centre


def background(rng: np.random.Generator) -> np.ndarray:
    """f32 [H, W, 3] in 0..1: smooth noise at a random scale, a ramp, sometimes stripes; two near colours."""
    coarse = int(rng.integers(2, 9))
    noise = rng.uniform(0, 1, (coarse + 1, coarse + 1))
    at = np.linspace(0, coarse, SIDE)
    rows = np.stack([np.interp(at, np.arange(coarse + 1), row) for row in noise])
    field = np.stack([np.interp(at, np.arange(coarse + 1), column) for column in rows.T], 1)
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    heading = rng.uniform(0, 2 * np.pi)
    along = np.cos(heading) * x + np.sin(heading) * y
    field = 0.6 * field + 0.4 * (along - along.min()) / np.ptp(along)
    if rng.uniform() < 0.4:
        field = 0.7 * field + 0.3 * (np.sin(along * rng.uniform(15, 50)) > 0)
    a = rng.uniform(0.1, 0.7, 3)
    b = a + rng.uniform(-0.25, 0.25, 3)
    return (a + field[..., None] * (b - a)).astype(np.float32)


def paints(colour: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A light and a dark tone, each f32 [3] in 0..1, within a sixteenth of the colour circle of `colour`."""
    hue = COLOURS.index(colour) / len(COLOURS) + rng.uniform(-1, 1) / 32
    light = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 1), rng.uniform(0.75, 1))
    dark = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 1), rng.uniform(0.1, 0.4))
    return np.array(light), np.array(dark)


def render(
    motion: str, colour: str, rng: np.random.Generator, shape: str | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One video u8 [T, H, W, 3] and its truth (see the module); shape: of all objects (None: any)."""
    n = int(rng.integers(1, OBJECTS + 1))
    shapes = rng.integers(0, len(SHAPES), n) if shape is None else np.full(n, SHAPES.index(shape))
    track, scene = tracks(motion, n, rng), background(rng)
    frames = np.broadcast_to(scene, (FRAMES, SIDE, SIDE, 3)).copy()
    masks = np.zeros((FRAMES, n, SIDE, SIDE), bool)
    grid_y, grid_x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)
    for i in range(n):  # from the farthest to the nearest
        c, s = np.cos(track.angle[:, i, None, None]), np.sin(track.angle[:, i, None, None])
        dx, dy = (
            (axis - track.position[:, i, k, None, None] + SIDE / 2) % SIDE - SIDE / 2
            for k, axis in enumerate((grid_x, grid_y))
        )
        radius = track.size[:, i, None, None]
        x, y = (c * dx + s * dy) / radius, (c * dy - s * dx) / radius
        cover = np.clip(
            0.5 - shape_distance(SHAPES[shapes[i]], x, y) * radius, 0, 1
        )  # antialiased over one pixel
        light, dark = paints(colour, rng)
        pattern = texture(int(rng.integers(4)), float(rng.uniform(0, 6)), x, y)[..., None]
        frames += cover[..., None] * (dark + pattern * (light - dark) - frames)
        masks[:, :i] &= ~(cover > 0.5)[:, None]
        masks[:, i] = cover > 0.5
    frames += rng.normal(0, 0.01, frames.shape)
    truth = {
        "masks": np.packbits(masks),
        "masks_shape": np.array(masks.shape),
        "shape": shapes,
        "depth": np.arange(n)[::-1].copy(),
        **track._asdict(),
    }
    return (frames.clip(0, 1) * 255).round().astype(np.uint8), truth


def write_video(path: Path, frames: np.ndarray, fps: int = FPS, crf: int = 18) -> None:
    """frames u8 [T, H, W, 3] -> an H.264 file, yuv420p, the same bytes every time: on pictures as small as these x264
    is not repeatable with B-frames and macroblock trees (half of 3,800 files differed from one run to the next)."""
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "bf": "0", "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as box:
        stream = box.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            box.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        box.mux(stream.encode())


def make_one(job: tuple[Path, str, str, str, tuple[int, ...]]) -> None:
    """Render and write the video and truth of one (out, key, motion, colour, seed)."""
    out, key, motion, colour, seed = job
    frames, truth = render(motion, colour, np.random.default_rng(seed))
    write_video(out / "videos" / f"{key}.mp4", frames)
    np.savez_compressed(out / "truth" / f"{key}.npz", **truth)  # type: ignore[arg-type]


def make_corpus(
    out: Path, train: int, test: int, labelled: int | None = None, seed: int = 0, workers: int = 2
) -> None:
    """Write train + test videos, their truth and labels.csv; classes are balanced over motion x colour.

    labelled: only the first so many train videos have labels in labels.csv (None: all), as in life.
    """
    if min(train, test, labelled or 0, seed) < 0 or workers < 1:
        raise UserError("--workers must be positive, --train, --test, --labelled and --seed >= 0")
    check_writable(out)
    if os.path.exists(out / "labels.csv"):
        raise UserError(f"{out} already holds a corpus: give another folder, or remove it")
    for name in ("videos", "truth"):
        make_folder(out / name)
    rows, jobs = [], []
    for number, (split, count) in enumerate((("train", train), ("test", test))):
        for at in range(count):
            motion, colour = MOTIONS[at % len(MOTIONS)], COLOURS[at // len(MOTIONS) % len(COLOURS)]
            key = f"{split}_{at:05d}"
            told = split == "test" or labelled is None or at < labelled
            rows.append((f"videos/{key}.mp4", *((motion, colour) if told else ("", "")), split))
            jobs.append((out, key, motion, colour, (seed, number, at)))
    with ProcessPoolExecutor(workers) as pool:
        list(tqdm(pool.map(make_one, jobs, chunksize=32), total=len(jobs), desc="render", unit="video"))
    with open(out / "labels.csv", "w", newline="") as f:  # last: a folder with it is complete
        csv.writer(f).writerows([("path", "label_motion", "label_appearance", "split"), *rows])


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="python -m data_prep.synthetic", description=__doc__.split("\n")[0])
    p.add_argument("out", type=Path)
    p.add_argument("--train", type=int, default=3000, help="videos for training")
    p.add_argument("--test", type=int, default=800, help="videos for testing")
    p.add_argument("--labelled", type=int, help="of the videos for training; default: all")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--workers", type=int, default=2, help="processes")
    make_corpus(**vars(p.parse_args(argv)))


if __name__ == "__main__":
    run_cli(main)
