"""Compares the throughput of pack's re-encoding with that of ffmpeg: `python tools/bench_pack.py FOLDER`.

Both encode the same videos with the same options of x264 on the same number of processes, in turn. CPU
seconds are summed over all processes and include start, decoding, checks and writing of shards. ffmpeg is the
binary of imageio-ffmpeg. pack's fixed cost (Python and its imports, in every process) is measured on one file
per process and reported separately.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from data_prep.x264 import x264_options
from vidssl.core.errors import UserError, run_cli
from vidssl.data.extensions import VIDEO_EXTENSIONS


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Returns CPU seconds of the processes that `work` starts, and wall-clock seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - start


def encode_with_pack(files: list[Path], out: Path, args: argparse.Namespace) -> None:
    """Packs the files into one folder of shards."""
    source = out / "source"
    source.mkdir()
    for i, file in enumerate(files):
        (source / f"{i}{file.suffix}").symlink_to(file.resolve())
    command = [sys.executable, "-m", "data_prep.pack", str(source), str(out / "shards")]
    command += ["--workers", str(args.processes)]
    for name in ("short_side", "fps", "keyframe_every", "crf", "preset"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def encode_with_ffmpeg(files: list[Path], out: Path, args: argparse.Namespace) -> None:
    """Re-encodes each file into a file of its own."""
    import imageio_ffmpeg

    n = args.short_side
    scale = f"scale=w='if(gt(iw,ih),-2,min({n},iw))':h='if(gt(iw,ih),min({n},ih),-2)':flags=bicubic"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-threads", "1", "-filter_threads", "1", "-i"]
    encoding = ["-an", "-vf", f"fps={args.fps},{scale}", "-pix_fmt", "yuv420p", "-c:v", "libx264"]
    for name, value in x264_options(args.crf, args.preset, args.keyframe_every).items():
        encoding += [f"-{name}", value]
    encoding += ["-movflags", "faststart"]

    def encode(job: tuple[int, Path]) -> None:
        subprocess.run([*command, str(job[1]), *encoding, str(out / f"{job[0]}.mp4")], check=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(encode, enumerate(files)))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python tools/bench_pack.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder of videos, at any depth")
    parser.add_argument("--files", type=int, default=40, help="number of videos, evenly spaced")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--short-side", type=int, default=224)
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--keyframe-every", type=int, default=8)
    parser.add_argument("--crf", type=int, default=23)
    parser.add_argument("--preset", default="medium")
    args = parser.parse_args(argv)
    found = sorted(p for p in args.folder.rglob("*") if p.suffix[1:].lower() in VIDEO_EXTENSIONS)
    if not found:
        raise UserError(f"{args.folder}: no video in it")
    files = found[:: max(1, len(found) // args.files)][: args.files]
    print(f"{len(files)} videos, {args.processes} processes")
    totals = {name: [0.0, 0.0] for name in ("pack", "ffmpeg", "pack, start", "ffmpeg, start")}  # CPU, wall
    for _ in range(args.rounds):
        for name, encode in (("pack", encode_with_pack), ("ffmpeg", encode_with_ffmpeg)):
            for label, subset in ((name, files), (f"{name}, start", files[: args.processes])):
                with tempfile.TemporaryDirectory() as folder:
                    seconds = measure(partial(encode, subset, Path(folder), args))
                totals[label] = [a + b / args.rounds for a, b in zip(totals[label], seconds, strict=True)]
    for label, (cpu, wall) in totals.items():
        print(f"{label:17} {cpu:7.2f} CPU s {wall:7.2f} s")
    fixed = totals["pack, start"][0] - totals["ffmpeg, start"][0]
    pack_cpu = totals["pack"][0]
    ffmpeg_cpu = totals["ffmpeg"][0]
    print(f"throughput of pack over ffmpeg's, by CPU: {ffmpeg_cpu / pack_cpu:.2f};", end=" ")
    print(f"without its fixed {fixed:.1f} s: {ffmpeg_cpu / (pack_cpu - fixed):.2f}")


if __name__ == "__main__":
    run_cli(main)
