"""Sequences with dense labels: DAVIS, JHMDB and NYUv2 as they are distributed, and the synthetic corpus.

A reader is called with the folder and "train" or "test" and lists samples; a sample reads its files when it
is loaded."""

import csv
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
from einops import rearrange

from vidssl.core.errors import DecodeError, UserError
from vidssl.core.io import file_sha256
from vidssl.core.tables import read_table
from vidssl.data.decoding import open_video
from vidssl.data.decoding.image import open_image

LabelKind = Literal["masks", "keypoints", "depth"]
NYU_MAX_METRES = 10.0  # meaning of 255 in the 8-bit depth of NYUv2's training images
NYU_SIZE = (480, 640)
NYU_CROP = (slice(45, 471), slice(41, 601))  # Eigen's crop (arXiv 1406.2283), of test images
JHMDB_BOX_SHARE = 0.6  # of the diagonal of the joints' box: the scale of errors
DAVIS_VOID = 255


class KeypointLabels(NamedTuple):
    """J key points in T frames."""

    xy: np.ndarray  # f64 [T, J, 2]  pixels from the center of the upper left pixel
    visible: np.ndarray  # bool [T, J]
    scale: np.ndarray  # f64 [T, J]  pixels; errors are measured in fractions of it


class DenseSample(NamedTuple):
    """A sequence of images u8 [T, H, W, 3] with labels: object ids u8 [T, H, W] (0: none), depths f32 [T, H,
    W] (0: unknown), or KeypointLabels."""

    name: str
    group: str  # samples of a group are resampled and held out together
    files: tuple[Path, ...]
    read: Callable[[], tuple[np.ndarray, Any]]

    def load(self) -> tuple[np.ndarray, Any]:
        """Returns images and labels. Raises UserError if a file cannot be read (SyntaxError: Pillow, broken
        PNG)."""
        try:
            return self.read()
        except (OSError, ValueError, KeyError, SyntaxError, DecodeError) as e:
            reason = " ".join(str(e).split())
            raise UserError(f"{self.files[0]}: it or its labels cannot be read: {reason}") from None


def data_hash(folder: Path, samples: list[DenseSample]) -> str:
    """SHA-256 over the names and contents of all files of the samples."""
    digest = hashlib.sha256()
    for path in sorted({file for sample in samples for file in sample.files}):
        name = path.relative_to(folder) if path.is_relative_to(folder) else path
        digest.update(f"{name.as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def read_image(path: Path) -> np.ndarray:
    """u8 [H, W, 3]."""
    return np.asarray(open_image(path).convert("RGB"))


def read_images(paths: list[Path]) -> np.ndarray:
    """u8 [T, H, W, 3]."""
    return np.stack([read_image(path) for path in paths])


def nonempty_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def check_exists(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: is listed but does not exist")
    return path


def davis(folder: Path, split: str) -> list[DenseSample]:
    """DAVIS 2017, semi-supervised: JPEGImages/480p/SEQ/*.jpg, Annotations/480p/SEQ/*.png with ids as palette
    indices, ImageSets/2017/train.txt and val.txt. https://davischallenge.org/davis2017/code.html"""
    samples = []
    list_name = "val" if split == "test" else split
    for name in nonempty_lines(folder / f"ImageSets/2017/{list_name}.txt"):
        images = sorted((folder / "JPEGImages/480p" / name).glob("*.jpg"))
        masks = [check_exists(folder / "Annotations/480p" / name / f"{path.stem}.png") for path in images]
        if len(images) < 3:
            raise UserError(
                f"{folder / 'JPEGImages/480p' / name}: has {len(images)} frames; three are needed"
            )
        samples.append(DenseSample(name, name, (*images, *masks), partial(_read_davis, images, masks)))
    return samples


def _read_davis(images: list[Path], masks: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    ids = []
    for path in masks:
        with open_image(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"{path.name} is {image.mode}, not a palette image of object ids")
            ids.append(np.asarray(image))
    frames = read_images(images)
    labels = np.stack(ids)
    if frames.shape[:3] != labels.shape:
        raise ValueError(f"images {frames.shape[1:3]} and annotations {labels.shape[1:]} differ in size")
    return frames, np.where(labels == DAVIS_VOID, 0, labels)  # void is background, as in the official toolkit


def jhmdb(folder: Path, split: str) -> list[DenseSample]:
    """JHMDB, split 1: Rename_Images/CLASS/VIDEO/*.png, joint_positions/CLASS/VIDEO/joint_positions.mat, and
    splits/CLASS_test_split1.txt with lines of VIDEO.avi and 1 (train) or 2 (test).
    http://jhmdb.is.tue.mpg.de"""
    if find_spec("scipy") is None:
        raise UserError(f"{folder}: reading joint_positions.mat needs scipy: pip install scipy")
    suffix = "_test_split1.txt"
    lists = sorted(folder.glob(f"splits/*{suffix}"))
    if not lists:
        raise UserError(f"{folder / 'splits'}: no CLASS{suffix}")
    samples = []
    for path in lists:
        class_name = path.name.removesuffix(suffix)
        for file, number in (line.rsplit(maxsplit=1) for line in nonempty_lines(path)):
            video = f"{class_name}/{file.removesuffix('.avi')}"
            images = sorted((folder / "Rename_Images" / video).glob("*.png"))
            joints = check_exists(folder / "joint_positions" / video / "joint_positions.mat")
            if not images:
                raise UserError(f"{folder / 'Rename_Images' / video}: has no *.png")
            if number == ("2" if split == "test" else "1"):
                reader = partial(_read_jhmdb, images, joints)
                samples.append(DenseSample(video, video, (*images, joints), reader))
    return samples


def _read_jhmdb(images: list[Path], joints: Path) -> tuple[np.ndarray, KeypointLabels]:
    """The scale is 0.6 x the diagonal of the box around the joints, as published (eval_pck.py of videowalk,
    arXiv 2006.14613); joints outside an image are not visible."""
    from scipy.io import loadmat

    xy = rearrange(loadmat(joints)["pos_img"].astype(float), "xy j t -> t j xy") - 1  # Matlab counts from 1
    count = min(len(xy), len(images))
    frames = read_images(images[:count])
    xy = xy[:count]
    visible = ((xy > -0.5) & (xy < np.array(frames.shape[2:0:-1]) - 0.5)).all(-1)
    inside = np.where(visible[..., None], xy, np.nan)
    with np.errstate(all="ignore"):
        box = np.nan_to_num(np.fmax.reduce(inside, 1) - np.fmin.reduce(inside, 1))  # [T, 2]
    scale = JHMDB_BOX_SHARE * np.hypot(*box.T)
    return frames, KeypointLabels(xy, visible, np.repeat(scale[:, None], xy.shape[1], 1))


@contextmanager
def _open_table(path: Path) -> Iterator[TextIO]:
    """Opens a csv file. Raises UserError for lines that are no table."""
    try:
        with open(path, newline="") as f:
            yield f
    except (csv.Error, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a csv file ({e})") from None


def nyu(folder: Path, split: str) -> list[DenseSample]:
    """NYUv2 as images: nyu2_train.csv and nyu2_test.csv (in the folder or its data/), with lines IMAGE,DEPTH
    relative to the folder; depth is 16-bit in millimetres, or 8-bit with 255 for 10 m. Test images of 480 x
    640 count inside Eigen's crop."""
    tables = [folder / f"nyu2_{split}.csv", folder / f"data/nyu2_{split}.csv"]
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        raise UserError(f"{folder}: no nyu2_{split}.csv, there or in data/")
    samples = []
    with _open_table(table) as f:
        for number, row in enumerate(csv.reader(f), 1):
            if len(row) != 2:
                raise UserError(f"{table}:{number}: expected IMAGE,DEPTH")
            image, depth = (check_exists(folder / name) for name in row)
            scene = image.parent.name if split == "train" else row[0]
            reader = partial(_read_nyu, image, depth, split == "test")
            samples.append(DenseSample(row[0], scene, (image, depth), reader))
    return samples


def _read_nyu(image: Path, depth: Path, crop: bool) -> tuple[np.ndarray, np.ndarray]:
    with open_image(depth) as stored:
        if not stored.mode.startswith(("I", "L")):
            raise ValueError(f"{depth.name} is {stored.mode}, neither 8-bit nor 16-bit grayscale")
        unit = NYU_MAX_METRES / 255 if stored.mode == "L" else 1e-3  # metres
        metres = np.asarray(stored).astype(np.float32) * unit
    frame = read_image(image)
    if frame.shape[:2] != metres.shape:
        raise ValueError(f"image {frame.shape[:2]} and depth {metres.shape} differ in size")
    if crop and metres.shape == NYU_SIZE:
        cropped = np.zeros_like(metres)
        cropped[NYU_CROP] = metres[NYU_CROP]
        metres = cropped
    return frame[None], metres[None]


def synthetic(label: LabelKind, folder: Path, split: str) -> list[DenseSample]:
    """A folder of data_prep.synthetic (the videos, not the shards)."""
    table = folder / "labels.csv"
    if not table.is_file():
        raise UserError(f"{table}: no such file")
    with _open_table(table) as f:
        videos = [folder / row["path"] for row in read_table(f) if row["split"] == split]
    samples = []
    for video in videos:
        truth = check_exists(folder / "truth" / f"{video.stem}.npz")
        reader = partial(_read_synthetic, check_exists(video), truth, label)
        samples.append(DenseSample(video.stem, video.stem, (video, truth), reader))
    return samples


def _read_synthetic(video: Path, truth: Path, label: LabelKind) -> tuple[np.ndarray, Any]:
    with open_video(video.read_bytes(), video.suffix[1:]) as opened:
        frames = opened.get(np.arange(len(opened.times)))
    arrays = np.load(truth)
    if "depth_map" not in arrays:
        raise ValueError(f"{truth} is of an older version; render the corpus again with vidssl synthetic")
    if label == "depth":
        return frames, arrays["depth_map"].astype(np.float32)
    if label == "keypoints":
        names = ("keypoints", "keypoints_visible", "keypoints_scale")
        return frames, KeypointLabels(*(arrays[name] for name in names))
    shape = arrays["masks_shape"]
    masks = np.unpackbits(arrays["masks"], count=int(np.prod(shape))).reshape(shape).astype(bool)
    ids = np.arange(1, masks.shape[1] + 1)
    return frames, (masks * ids[:, None, None]).sum(1).astype(np.uint8)


READERS: dict[LabelKind, dict[str, Callable[[Path, str], list[DenseSample]]]] = {  # label -> format -> reader
    "masks": {"davis": davis, "synthetic": partial(synthetic, "masks")},
    "keypoints": {"jhmdb": jhmdb, "synthetic": partial(synthetic, "keypoints")},
    "depth": {"nyu": nyu, "synthetic": partial(synthetic, "depth")},
}
