"""Measures CPU seconds per training clip: common practice, this loader, and FFmpeg decoding alone.

python tools/bench_data.py FOLDER [--videos 16] [--source DIR] [--clips 96] [--rounds 3] [--workers 2] [--out
FILE.json]

FOLDER keeps the files that the tool makes: 10 s of H.264, 340 x 256, 30 frames a second, with the B-frames
and key frames that FFmpeg gives by default, from the videos below --source (looped and scaled), else drawn;
the same packed as they are, and packed clip-ready. A clip is 16 frames, every fourth, in random crops of 224
px. The contenders take turns in fresh processes; what counts is the CPU time of a process and its workers,
the median of the rounds.

- common: decord's get_batch at full size, float, torch crop, resize and normalise, float batches out of the
workers
- original: this loader on the same bytes, same clips and crops
- clip-ready: this loader on `pack --short-side 256 --fps 8 --keyframe-every 8` of them, every frame
- original-planes, clip-ready-planes: the same with data.augment_on=device. What the device would do is not in
their CPU time; `rest` is its CPU time when this CPU does it.

share: frames that have to be decoded for the clips (from the key frame before to the last) per CPU second,
over the frames per CPU second that single-threaded FFmpeg decodes of the same files.
"""

import argparse
import io
import json
import resource
import shutil
import statistics
import subprocess
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop

from data_prep import pack
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder
from vidssl.core.pixels import MEAN, STD
from vidssl.data.augment import RandomCrop
from vidssl.data.dataset import MultiStreamDataset, TrainClips
from vidssl.data.decoding.decord import decord
from vidssl.data.decoding.video_stream import open_container
from vidssl.data.extensions import VIDEO_EXTENSIONS
from vidssl.data.loader import train_steps
from vidssl.data.order import Order
from vidssl.data.sampling import sample_indices
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards

BATCH = 8
CROP = RandomCrop(224, flip=0.5)
CLIP_READY = ["--short-side", "256", "--fps", "8", "--keyframe-every", "8"]


class Common(Dataset[torch.Tensor]):
    """The usual steps of training code for a clip (those of V-JEPA's loader), at the same positions as
    `clips`."""

    def __init__(self, clips: TrainClips, crop: RandomCrop):
        self.clips, self.crop = clips, crop

    def __getitem__(self, g: int) -> torch.Tensor:
        """Returns a normalised clip f32 [3, T, size, size]."""
        shards = self.clips.shards
        d = self.clips.data
        crop = self.crop
        start = np.random.default_rng((self.clips.order.seed, 3, g)).uniform()
        reader = decord.VideoReader(
            io.BytesIO(shards.read(shards.sample(*self.clips.order.locate(g)))), num_threads=1
        )
        frames = reader.get_batch(
            sample_indices(np.arange(len(reader)), d.frames, d.stride, start=start)
        ).asnumpy()
        video = torch.from_numpy(frames).float().permute(3, 0, 1, 2)
        top, left, height, width = RandomResizedCrop.get_params(video, list(crop.scale), list(crop.ratio))
        video = video[:, :, top : top + height, left : left + width]
        video = torch.nn.functional.interpolate(
            video, (crop.size, crop.size), mode="bilinear", align_corners=False
        )
        if torch.rand(()) < crop.flip:
            video = video.flip(-1)
        mean, std = (255 * torch.tensor(c).view(3, 1, 1, 1) for c in (MEAN, STD))
        return video.sub_(mean).div_(std)


PLANES = "-planes"


def corpus_of(name: str) -> str:
    """The folder that a contender reads."""
    return "clip-ready" if name.startswith("clip-ready") else "original"


def clips_of(name: str, folder: Path, seed: int) -> TrainClips:
    """The clips of a contender."""
    corpus = corpus_of(name)
    return make_clips(folder / corpus, 1 if corpus == "clip-ready" else 4, seed, name.endswith(PLANES))


def make_clips(folder: Path, stride: int, seed: int, on_device: bool = False) -> TrainClips:
    shards = Shards([str(folder)])
    place: Literal["device", "host"] = "device" if on_device else "host"
    data = DataConfig([str(folder)], frames=16, stride=stride, augment_on=place)
    return TrainClips(shards, Order(shards.counts, seed), data, CROP)


def contender(name: str, folder: Path, clips: int, workers: int, seed: int) -> tuple[float, float]:
    """Returns CPU seconds of this process and its workers for `clips` clips, without the start (measured by a
    run of one batch), and what is left to a device."""
    torch.set_num_threads(1)
    ours = clips_of(name, folder, seed)
    marks = [cpu_seconds()]
    batches: list[Any] = []
    for count in (BATCH, BATCH + clips):
        if name == "common":
            loader = DataLoader(Common(ours, CROP), BATCH, sampler=range(count), num_workers=workers)
            seen = sum(len(b) for b in loader)
        else:
            seen = 0
            for (b,) in train_steps(MultiStreamDataset([ours]), 0, count // BATCH, [BATCH], workers=workers):
                seen += len(b.key)
                batches = [b.video]  # one of the last round, to be made
        assert seen == count
        marks.append(cpu_seconds())
    rest = 0.0
    for batch in batches if name.endswith(PLANES) else ():
        batch.to(torch.device("cpu"))  # imports, caches
        begun = cpu_seconds()
        batch.to(torch.device("cpu"))
        rest = (cpu_seconds() - begun) * clips / BATCH
    return marks[2] - marks[1] - (marks[1] - marks[0]), rest


def cpu_seconds() -> float:
    """Returns CPU seconds of this process and of its ended children."""
    use = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in use)


def ffmpeg_binary() -> str:
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg
    except ImportError:
        raise UserError("no ffmpeg on the path: install it, or pip install imageio-ffmpeg") from None
    return imageio_ffmpeg.get_ffmpeg_exe()


def decoding_rate(ffmpeg: str, files: list[Path], beside: Path) -> float:
    """Returns the frames per CPU second of single-threaded FFmpeg, all files in one process."""
    beside.write_text("".join(f"file '{f.resolve()}'\n" for f in files))
    begun = cpu_seconds()
    args = [
        "-threads",
        "1",
        "-f",
        "concat",
        "-safe",
        "0",
        "-i",
        str(beside),
        "-fps_mode",
        "passthrough",
        "-f",
        "null",
    ]
    subprocess.run(
        [ffmpeg, "-v", "error", "-filter_threads", "1", *args, "-"], check=True, stdin=subprocess.DEVNULL
    )
    used = cpu_seconds() - begun
    return sum(frames_in(f) for f in files) / used


def frames_in(file: Path) -> int:
    with open(file, "rb") as data, open_container(data) as container:
        return container.streams.video[0].frames


def unpack(clips: TrainClips, folder: Path) -> list[Path]:
    """Extracts the media files of the shards into `folder` and returns them."""
    folder.mkdir(exist_ok=True)
    for sample in clips.shards.list_samples():
        (folder / f"{sample.key}.{sample.ext}").write_bytes(clips.shards.read(sample))
    return sorted(folder.iterdir())


def make_files(folder: Path, source: Path | None, videos: int, ffmpeg: str, workers: int) -> list[Path]:
    """Makes the corpus and its two packed versions unless they exist; returns the files."""
    corpus = folder / "files"
    corpus.mkdir(parents=True, exist_ok=True)
    found = sorted(p for p in source.rglob("*") if p.suffix[1:].lower() in VIDEO_EXTENSIONS) if source else []
    if source and not found:
        raise UserError(f"{source}: no videos in it")
    files = [corpus / f"{i:03d}.mp4" for i in range(videos)]
    for i, file in enumerate(files):
        if file.exists():
            continue
        if found:
            taken = ["-stream_loop", "-1", "-i", str(found[i * len(found) // videos])]
        else:  # a slow zoom into a fractal under camera noise
            taken = [
                "-f",
                "lavfi",
                "-i",
                f"mandelbrot=340x256:rate=30:start_x={-0.7 - i / 100},noise=alls=8:allf=t",
            ]
        beside = file.with_suffix(".part")
        codec = [
            "-vf",
            "scale=340:256",
            "-r",
            "30",
            "-t",
            "10",
            "-an",
            "-pix_fmt",
            "yuv420p",
            "-c:v",
            "libx264",
        ]
        args = [*taken, *codec, "-threads", "1", "-f", "mp4", str(beside)]
        subprocess.run([ffmpeg, "-v", "error", "-y", *args], check=True, stdin=subprocess.DEVNULL)
        beside.rename(file)
    for name, options in (("original", []), ("clip-ready", CLIP_READY)):
        pack.main([str(corpus), str(folder / name), "--workers", str(workers), *options])
    return files


def frames_to_decode(clips: TrainClips, count: int) -> float:
    """Returns the mean number of frames from the key frame before a clip's first frame to its last frame."""
    keys: dict[str, np.ndarray] = {}
    needed = []
    for g in range(count):
        sample = clips.shards.sample(*clips.order.locate(g))
        if sample.key not in keys:
            with open_container(io.BytesIO(clips.shards.read(sample))) as file:
                demuxed: Any = file.demux(video=0)  # type: ignore[union-attr]
                packets = sorted((p.pts, p.is_keyframe) for p in demuxed if p.pts is not None)
            keys[sample.key] = np.flatnonzero([is_key for _, is_key in packets])
        start = np.random.default_rng((clips.order.seed, 3, g)).uniform()
        indices = sample_indices(
            np.arange(sample.meta["frames"]), clips.data.frames, clips.data.stride, start=start
        )
        before = keys[sample.key]
        needed.append(indices[-1] - before[before <= indices[0]].max() + 1)
    return float(np.mean(needed))


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--videos", type=int, default=16)
    p.add_argument("--source", type=Path)
    p.add_argument("--clips", type=int, default=96, help="a round; a multiple of 8")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--out", type=Path)
    a = p.parse_args(argv)
    if a.out:
        check_writable(a.out.parent)
        make_folder(a.out.parent)
    if a.clips % BATCH:
        raise UserError(f"--clips {a.clips}: expected a multiple of {BATCH}")
    ffmpeg = ffmpeg_binary()
    files = {"original": make_files(a.folder, a.source, a.videos, ffmpeg, a.workers)}
    files["clip-ready"] = unpack(make_clips(a.folder / "clip-ready", 1, 0), a.folder / "clip-ready-files")
    ours = ("original", "clip-ready")
    names = ("common", *ours, *(name + PLANES for name in ours))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    rest: dict[str, float] = {}
    rates: dict[str, list[float]] = {name: [] for name in files}
    for seed in range(a.rounds):
        for name, each in rates.items():
            each.append(decoding_rate(ffmpeg, files[name], a.folder / "files.txt"))
        for name, measured in seconds.items():
            with ProcessPoolExecutor(1, get_context("fork")) as fresh:
                used, left = fresh.submit(contender, name, a.folder, a.clips, a.workers, seed).result()
            rest[name] = left / a.clips
            measured.append(used / a.clips)
    report: dict[str, Any] = {}
    print(f"{a.rounds} x {a.clips} clips, {a.workers} workers, {a.videos} videos")
    print(
        f"{'':18s}{'CPU ms/clip':>12s}{'(spread)':>18s}{'of common':>11s}"
        f"{'frames':>8s}{'ffmpeg f/s':>12s}{'share':>7s}{'rest':>7s}"
    )
    for name, measured in seconds.items():
        kind = corpus_of(name)
        clips = [clips_of(name, a.folder, seed) for seed in range(a.rounds)]
        needed = statistics.mean(frames_to_decode(c, a.clips) for c in clips)
        median = statistics.median(measured)
        rate = statistics.median(rates[kind])
        row = {
            "cpu_s": median,
            "rounds": measured,
            "of_common": median / statistics.median(seconds["common"]),
        }
        row |= {"frames": needed, "ffmpeg_frames_per_s": rate, "share": needed / median / rate}
        row["rest_cpu_s"] = rest[name]
        report[name] = row
        spread = f"{1e3 * min(measured):.1f} .. {1e3 * max(measured):.1f}"
        print(f"{name:18s}{1e3 * median:12.1f}{spread:>18s}{row['of_common']:11.2f}", end="")
        print(f"{needed:8.0f}{rate:12.0f}{row['share']:7.2f}{1e3 * rest[name]:7.1f}")
    if a.out:
        a.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    run_cli(main)
