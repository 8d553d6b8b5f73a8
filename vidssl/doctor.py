"""What this machine has, and what is missing: versions, devices, decoders, disk, limits; a decode and a step.

    vidssl doctor

Put the output into a report of a fault. Exit status 2 if a video cannot be decoded or a step cannot be taken
here.
"""

import sys

if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    print(__doc__.strip())
    sys.exit(0)

import importlib.metadata
import io
import os
import platform
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import torch
from packaging.requirements import Requirement

import vidssl
from vidssl.core.cpus import available_cpus
from vidssl.core.errors import DecodeError, UserError, run_cli
from vidssl.core.memory import free_memory
from vidssl.core.rng import KeyedRNG
from vidssl.core.versions import version_of
from vidssl.data.decoding import check_decoder, open_video
from vidssl.model.predictor import JointPredictor, MaskToken
from vidssl.model.vit import Encoder
from vidssl.objective.errors import ERRORS
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.objective.masks import Tube
from vidssl.objective.targets import Pixels

FEW_OPEN_FILES = 4096  # soft limit below which many loader workers run out of descriptors
LITTLE_SHARED_MEMORY = 1 << 30  # bytes of /dev/shm, through which loader workers hand over batches
LITTLE_DISK = 10 << 30  # bytes
CODECS = ("h264", "hevc", "vp9", "av1", "mpeg4")
FRAMES, SIDE = 8, 64  # of the video that is decoded


def requirements() -> dict[str, list[str]]:
    """Extra -> its packages, from the installed project; "" are those that it always needs."""
    found: dict[str, list[str]] = {"": []}
    for text in importlib.metadata.requires("vidssl") or []:
        requirement = Requirement(text)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker or ""))
        if extra is not None:
            found.setdefault(extra[1], []).append(requirement.name)
        elif requirement.marker is None or requirement.marker.evaluate():
            found[""].append(requirement.name)
    return found


def package_lines() -> Iterator[str]:
    """Versions of what is needed, and what each extra lacks."""
    for extra, names in requirements().items():
        versions = {name: version_of(name) for name in dict.fromkeys(names)}
        if not extra:
            yield "packages: " + ", ".join(f"{n} {v or 'MISSING'}" for n, v in versions.items())
        else:
            missing = [name for name, version in versions.items() if version is None]
            lacks = f"lacks {', '.join(missing)}: pip install 'vidssl[{extra}]'"
            yield f"extra {extra}: " + (lacks if missing else "complete")


def device_lines() -> Iterator[str]:
    if not torch.cuda.is_available():
        yield f"devices: none beside the CPU (torch {torch.__version__}, CUDA {torch.version.cuda or 'no'})"
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield f"device {i}: {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else "no"
    yield f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}, bf16 {bf16}"


def limit_lines() -> Iterator[str]:
    """Cores, memory, open files, shared memory and disk, with a word where they are little."""
    memory = free_memory()
    yield f"cores: {available_cpus()}; memory free: " + ("?" if memory is None else f"{memory / 1e9:.1f} GB")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f" (few: ulimit -n {hard})" if soft < min(FEW_OPEN_FILES, hard) else ""
    yield f"open files: {soft}, at most {hard}{advice}"
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if largest != resource.RLIM_INFINITY:
        yield f"files: at most {largest / 1e9:.3g} GB (ulimit -f): a larger checkpoint cannot be written"
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        advice = " (little: docker run --shm-size=8g)" if size < LITTLE_SHARED_MEMORY else ""
        yield f"shared memory: {size / 1e9:.1f} GB{advice}"
    for folder in dict.fromkeys((os.getcwd(), tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        yield f"disk: {free / 1e9:.0f} GB free in {folder}" + (" (little)" if free < LITTLE_DISK else "")


def make_video() -> bytes:
    """A small MPEG-4 video, which every build of FFmpeg can write and read."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for t in range(FRAMES):
            picture = np.full((SIDE, SIDE, 3), 16 * t, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    return file.getvalue()


def decoder_line(decoder: str, video: bytes) -> tuple[bool, str]:
    """(whether it decodes the made video, a line)."""
    try:
        check_decoder(decoder)  # type: ignore[arg-type]
        meta = {"frames": FRAMES, "decord": True} if decoder != "pyav" else None
        with open_video(video, "mp4", meta, decoder) as opened:  # type: ignore[arg-type]
            frames = opened.get(list(range(FRAMES)))
        works = bool(abs(frames[:, 0, 0, 0].astype(int) - 16 * np.arange(FRAMES)).max() < 8)
        return works, f"decoder {decoder}: " + ("works" if works else "WRONG frames")
    except (UserError, DecodeError, ImportError, OSError) as e:
        return False, f"decoder {decoder}: {str(e).splitlines()[0]}"


def codec_line() -> str:
    """Which of the common codecs PyAV's FFmpeg decodes."""
    lacking = [name for name in CODECS if name not in av.codecs_available]
    version = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"FFmpeg of PyAV: libavcodec {version}, " + (
        f"LACKS {', '.join(lacking)}" if lacking else f"decodes {', '.join(CODECS)}"
    )


def step_line(device: str) -> tuple[bool, str]:
    """(whether a small step can be taken, a line)."""
    try:
        return True, take_step(device)
    except RuntimeError as e:
        return False, f"step on {device}: FAILS: {str(e).strip().splitlines()[0]}"


def take_step(device: str) -> str:
    """Takes a small step, forward and backward, and says how long it took."""
    torch.manual_seed(0)
    encoder = Encoder(FRAMES, SIDE, SIDE, dim=48, depth=2, heads=3, patch=16)
    target = Pixels(encoder)
    predictor = JointPredictor(encoder, target.width, width=24, depth=1, heads=2)
    parts = (encoder, Tube(0.75), target, MaskToken(24), predictor, ERRORS["l2"]())
    objective = MaskedPrediction(*parts).to(device)
    began = time.perf_counter()
    rng = KeyedRNG(0, 0, torch.arange(2))
    loss = objective(torch.rand(2, 3, FRAMES, SIDE, SIDE, device=device), rng)["loss"]
    loss.backward()
    return f"step on {device}: loss {loss.item():.3f} in {time.perf_counter() - began:.2f} s"


def main(argv: list[str]) -> None:
    if argv:
        raise UserError(f"doctor takes no arguments, not {argv[0]}")
    print(f"vidssl {vidssl.__version__} in {Path(vidssl.__file__).parent}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    for line in (*package_lines(), *device_lines(), *limit_lines()):
        print(line)
    video = make_video()
    works = {}
    for decoder in ("pyav", "decord", "torchcodec"):
        works[decoder], line = decoder_line(decoder, video)
        print(line)
    print(codec_line())
    steps = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        steps[device], line = step_line(device)
        print(line)
    if not works["pyav"]:
        raise UserError("PyAV does not decode here: reinstall av, or see its line above")
    if failed := [device for device, taken in steps.items() if not taken]:
        raise UserError(f"no step can be taken on {failed[0]}: see its line above; reinstall torch for it")


if __name__ == "__main__":
    run_cli(main)
