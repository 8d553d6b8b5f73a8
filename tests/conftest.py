"""Fixtures shared by the tests: small videos, made here, whose frame index can be read from the pixels."""

import io
import os
import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import pack
from data_prep.index import write_lines
from data_prep.synthetic import make_corpus
from vidssl.core.io import exclusive_lock
from vidssl.core.log import configure_logging
from vidssl.data.format import dumps, dumps_index, shard_entry

FRAMES, WIDTH, HEIGHT, RATE = 20, 64, 48, 10
CLASSES = ("clap", "run", "wave")

FOLDER_MARKS = {  # folder of tests/: marks of all tests in it
    "integration": ("slow",),
    "distributed": ("slow", "multiprocess"),
    "parity": ("slow",),
    "robustness": ("slow",),
}

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: more threads would only wait for each other
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of a folder, and skips tests that need a GPU where there is none (an error with
    CI_GPU=1)."""
    root = Path(__file__).parent
    for item in items:
        for mark in FOLDER_MARKS.get(item.path.relative_to(root).parts[0], ()):
            item.add_marker(mark)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            if os.environ.get("CI_GPU") == "1":
                raise pytest.UsageError(f"CI_GPU=1, but there is no GPU for {item.nodeid}")
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def log_lines_on_stderr() -> None:
    """Log lines go to stderr as in every command, whatever an earlier test in this process has set."""
    configure_logging()


@pytest.fixture(autouse=True)
def signal_handlers() -> None:
    """A test finds the handlers of a fresh interpreter. A shell lets what it starts in the background ignore
    Ctrl-C, and a program that an earlier test ran in this process ignores SIGTERM once that has ended it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def level_of(i: int) -> int:
    """Grey level of frame i."""
    return 20 + 10 * i


def index_of(frame: np.ndarray) -> int:
    """Frame index, from the pixels of a frame u8 [H,W,3]; its middle is grey."""
    h, w = frame.shape[:2]
    return round((float(frame[h // 3 : -h // 3, w // 3 : -w // 3].mean()) - 20) / 10)


def encode_video(
    frames: int = FRAMES,
    times: list[int] | None = None,
    rotation: int = 0,
    hflip: bool = False,
    codec: str = "libx264",
    container: str = "mp4",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    **options: str,
) -> bytes:
    """A video as bytes. times: of each frame in milliseconds (default: RATE frames a second). The stored
    picture has a white upper-left corner (not a grey level), so that turns and flips show. rotation: degrees
    clockwise when shown."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE, options={"crf": "4", "g": "8", "bf": "2", **options})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if times is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        if rotation or hflip:
            stream.set_display_rotation(-rotation, hflip=hflip)
        for i in range(frames):
            picture = np.full((*size, 3), level_of(i % FRAMES), np.uint8)
            picture[: size[0] // 4, : size[1] // 4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts = times[i]
                frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def encode_image(kind: str, orientation: int = 1) -> bytes:
    """A 64x48 picture (width x height) with a white upper-left corner as stored."""
    picture = np.full((HEIGHT, WIDTH, 3), 100, np.uint8)
    picture[: HEIGHT // 4, : WIDTH // 4] = 255
    out = io.BytesIO()
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(out, kind, exif=exif)
    return out.getvalue()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that make(folder) fills, once for all processes of this session. Do not write into it."""
    own = factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    folder = root / name
    done = root / f"{name}.made"
    with exclusive_lock(root / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def make_video() -> Callable[..., bytes]:
    return encode_video


@pytest.fixture(scope="session")
def make_image() -> Callable[..., bytes]:
    return encode_image


@pytest.fixture(scope="session")
def frame_index() -> Callable[[np.ndarray], int]:
    return index_of


@pytest.fixture(scope="session")
def write_index() -> Callable[..., Path]:
    """Writes a data set of which only the index is read, from the metadata of its samples."""

    def write(folder: Path, ext: str, metas: list[dict], classes: dict[str, list[str]]) -> Path:
        folder.mkdir()
        tar = folder / "shard-000000.tar"
        tar.write_bytes(b"x")
        records = [
            {"key": f"{i}", "ext": ext, "offset": 0, "size": 9, "meta": m} for i, m in enumerate(metas)
        ]
        write_lines(tar.with_suffix(".jsonl"), map(dumps, records))
        entries = [shard_entry(tar, len(records))]
        write_lines(folder / "index.json", [dumps_index(classes, entries, 0, {"plan": "x"})])
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 H.264 files of 20 frames, 64x48, in 3 class folders. Do not write into it."""
    root = tmp_path_factory.mktemp("tiny_corpus")
    for c, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(4):
            (root / name / f"{name} {i}.v.mp4").write_bytes(encode_video(FRAMES - c, g=str(5 + i)))
    return root


@pytest.fixture(scope="session")
def tiny_shards(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny corpus, packed. Do not write into it."""
    out = tmp_path_factory.mktemp("tiny_shards") / "shards"
    pack.main([str(tiny_corpus), str(out), "--workers", "2", "--samples-per-shard", "5"])
    return out


@pytest.fixture(scope="session")
def odd_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file of each kind that needs care, and some that are no video. Do not write into it."""
    root = tmp_path_factory.mktemp("odd_corpus")
    whole = encode_video(codec="mpeg4", container="matroska", bf="0")
    files = {
        "good/vfr.mp4": encode_video(6, times=[0, 100, 130, 500, 510, 900]),
        "good/rotated.mp4": encode_video(rotation=90),
        "good/mirrored.mp4": encode_video(hflip=True),
        "good/short.mp4": encode_video(2),
        "good/one.webm": encode_video(1, codec="libvpx-vp9", container="webm"),
        "good/picture.JPG": encode_image("jpeg"),
        "good/turned.jpeg": encode_image("jpeg", orientation=6),
        "good/picture.png": encode_image("png"),
        "good/truncated.mkv": whole[: int(len(whole) * 0.6)],
        "bad/truncated.mp4": encode_video()[:1000],
        "bad/text.mp4": b"this is not a video\n" * 50,
        "bad/empty.mp4": b"",
        "bad/text.png": b"this is not a picture\n" * 50,
        "notes.txt": b"ignored",
    }
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="session")
def synthetic_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 + 30 videos of data_prep.synthetic (seed 0), with truth and labels.csv. Do not write into it."""
    return made_once(tmp_path_factory, "corpus", lambda root: make_corpus(root, 60, 30, workers=2))


@pytest.fixture(scope="session")
def synthetic_shards(synthetic_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` and `test`, packed from the synthetic corpus. Do not write into it."""
    return made_once(
        tmp_path_factory,
        "shards",
        lambda out: pack.main([str(synthetic_corpus), str(out), "--workers", "2"]),
    )
