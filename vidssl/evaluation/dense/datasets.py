"""Sequences with a truth for their pixels: DAVIS, JHMDB and NYUv2 as they are distributed, and the synthetic corpus.

A reader is called with the folder and "train" or "test" and lists items; an item reads its files when it is loaded.
"""

import csv
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vidssl.core.errors import DecodeError, UserError
from vidssl.core.io import file_sha256
from vidssl.data.decoding import open_video

NYU_METRES = 10.0  # what 255 means in the 8-bit depth of NYUv2's training pictures
NYU_SIZE, NYU_CROP = (
    (480, 640),
    (slice(45, 471), slice(41, 601)),
)  # Eigen's crop (arXiv 1406.2283), of test pictures
BACKGROUND = 3.0  # level of depth behind the two objects of a synthetic video
SPOTS = np.array([(0.6, 0), (0, 0.6), (-0.6, 0), (0, -0.6)])  # key points of a synthetic object, in radii


class KeypointLabels(NamedTuple):
    """J key points of T frames."""

    xy: np.ndarray  # f64 [T, J, 2]  pixels from the middle of the upper left pixel
    seen: np.ndarray  # bool [T, J]
    scale: np.ndarray  # f64 [T, J]  pixels; an error is told as a share of it


class DenseSample(NamedTuple):
    """A sequence: pictures u8 [T, H, W, 3], and ids of objects u8 [T, H, W] (0: none), depths f32 [T, H, W] (0: not
    known) or Points."""

    name: str
    group: str  # what is bootstrap_metric_ci and held out together
    files: tuple[Path, ...]
    read: Callable[[], tuple[np.ndarray, Any]]

    def load(self) -> tuple[np.ndarray, Any]:
        """-> pictures and truth."""
        try:
            return self.read()
        except (
            OSError,
            ValueError,
            KeyError,
            SyntaxError,
            DecodeError,
        ) as e:  # SyntaxError: Pillow's, of a broken PNG
            raise UserError(
                f"{self.files[0]}: cannot be read with its truth: {' '.join(str(e).split())}"
            ) from None


def data_hash(folder: Path, items: list[DenseSample]) -> str:
    """SHA-256 over the names and contents of all files that are read."""
    digest = hashlib.sha256()
    for path in sorted({file for item in items for file in item.files}):
        name = path.relative_to(folder) if path.is_relative_to(folder) else path
        digest.update(f"{name.as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def picture(path: Path) -> np.ndarray:
    """u8 [H, W, 3]."""
    return np.asarray(Image.open(path).convert("RGB"))


def listed(path: Path) -> list[str]:
    """Lines of a text file that are not empty."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def there(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: is listed, but not there")
    return path


def davis(folder: Path, split: str) -> list[DenseSample]:
    """DAVIS 2017, semi-supervised: JPEGImages/480p/SEQ/*.jpg, Annotations/480p/SEQ/*.png with ids as palette numbers,
    ImageSets/2017/train.txt and val.txt. https://davischallenge.org/davis2017/code.html"""
    items = []
    for name in listed(folder / "ImageSets/2017" / f"{'val' if split == 'test' else split}.txt"):
        frames = sorted((folder / "JPEGImages/480p" / name).glob("*.jpg"))
        truths = [there(folder / "Annotations/480p" / name / f"{f.stem}.png") for f in frames]
        if len(frames) < 3:
            raise UserError(
                f"{folder / 'JPEGImages/480p' / name}: has {len(frames)} frames, not three or more"
            )
        items.append(DenseSample(name, name, (*frames, *truths), partial(_read_davis, frames, truths)))
    return items


def _read_davis(frames: list[Path], truths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    ids = []
    for path in truths:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise ValueError(f"{path.name} is {image.mode}, not a palette picture of object numbers")
            ids.append(np.asarray(image))
    shown, masks = np.stack([picture(f) for f in frames]), np.stack(ids)
    if shown.shape[:3] != masks.shape:
        raise ValueError(f"pictures {shown.shape[1:3]} and annotations {masks.shape[1:]} differ in size")
    return shown, np.where(masks == 255, 0, masks)  # 255 is void: background, as the toolkit takes it


def jhmdb(folder: Path, split: str) -> list[DenseSample]:
    """JHMDB, split 1: Rename_Images/CLASS/VIDEO/*.png, joint_positions/CLASS/VIDEO/joint_positions.mat, and
    splits/CLASS_test_split1.txt, whose lines say VIDEO.avi and 1 (train) or 2 (test). http://jhmdb.is.tue.mpg.de"""
    lists, wanted, items = (
        sorted(folder.glob("splits/*_test_split1.txt")),
        "2" if split == "test" else "1",
        [],
    )
    if not lists:
        raise UserError(f"{folder / 'splits'}: no CLASS_test_split1.txt")
    for path in lists:
        kind = path.name.removesuffix("_test_split1.txt")
        for name, part in (line.rsplit(maxsplit=1) for line in listed(path)):
            video = f"{kind}/{name.removesuffix('.avi')}"
            frames = sorted((folder / "Rename_Images" / video).glob("*.png"))
            truth = there(folder / "joint_positions" / video / "joint_positions.mat")
            if not frames:
                raise UserError(f"{folder / 'Rename_Images' / video}: holds no *.png")
            if part == wanted:
                items.append(DenseSample(video, video, (*frames, truth), partial(_read_jhmdb, frames, truth)))
    return items


def _read_jhmdb(frames: list[Path], truth: Path) -> tuple[np.ndarray, KeypointLabels]:
    """An error is a share of 0.6 x the diagonal of the box around the joints, as published (eval_pck.py of videowalk,
    arXiv 2006.14613); joints outside a picture are not asked for."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as e:
        raise UserError(f"{truth}: reading it needs scipy: pip install scipy") from e
    xy = (
        loadmat(truth)["pos_img"].astype(float).transpose(2, 1, 0) - 1
    )  # [2, J, T] from 1 on, as Matlab counts
    count = min(len(xy), len(frames))
    shown, xy = np.stack([picture(f) for f in frames[:count]]), xy[:count]
    seen = ((xy > -0.5) & (xy < np.array(shown.shape[2:0:-1]) - 0.5)).all(-1)
    box = np.where(seen[..., None], xy, np.nan)
    with np.errstate(all="ignore"):
        span = np.nan_to_num(np.fmax.reduce(box, 1) - np.fmin.reduce(box, 1))
    return shown, KeypointLabels(xy, seen, np.repeat(0.6 * np.hypot(*span.T)[:, None], xy.shape[1], 1))


def nyu(folder: Path, split: str) -> list[DenseSample]:
    """NYUv2 as pictures: nyu2_train.csv and nyu2_test.csv (here or in data/), each line PICTURE,DEPTH from this folder;
    depth is 16-bit in millimetres, or 8-bit with 255 for 10 m. Test pictures of 480 x 640 count inside Eigen's crop."""
    table = next(
        (p for p in (folder / f"nyu2_{split}.csv", folder / f"data/nyu2_{split}.csv") if p.is_file()), None
    )
    if table is None:
        raise UserError(f"{folder}: no nyu2_{split}.csv, there or in data/")
    items = []
    with open(table, newline="") as f:
        for number, row in enumerate(csv.reader(f), 1):
            if len(row) != 2:
                raise UserError(f"{table}:{number}: expected PICTURE,DEPTH")
            shown, depth = (there(folder / name) for name in row)
            scene = shown.parent.name if split == "train" else row[0]
            items.append(
                DenseSample(row[0], scene, (shown, depth), partial(_read_nyu, shown, depth, split == "test"))
            )
    return items


def _read_nyu(shown: Path, depth: Path, crop: bool) -> tuple[np.ndarray, np.ndarray]:
    with Image.open(depth) as image:
        if not image.mode.startswith(("I", "L")):
            raise ValueError(f"{depth.name} is {image.mode}, neither 8-bit nor 16-bit grey")
        metres = np.asarray(image).astype(np.float32) * (NYU_METRES / 255 if image.mode == "L" else 1e-3)
    frame = picture(shown)
    if frame.shape[:2] != metres.shape:
        raise ValueError(f"picture {frame.shape[:2]} and depth {metres.shape} differ in size")
    if crop and metres.shape == NYU_SIZE:
        inside = np.zeros_like(metres)
        inside[NYU_CROP] = metres[NYU_CROP]
        metres = inside
    return frame[None], metres[None]


def synthetic(truth: str, folder: Path, split: str) -> list[DenseSample]:
    """A folder of data_prep.synthetic (the videos, not the shards). truth: "masks", "depth" or "points"."""
    listed(folder / "labels.csv")  # is it there?
    with open(folder / "labels.csv", newline="") as f:
        videos = [folder / row["path"] for row in csv.DictReader(f) if row["split"] == split]
    pairs = [(there(v), there(folder / "truth" / f"{v.stem}.npz")) for v in videos]
    return [DenseSample(v.stem, v.stem, (v, t), partial(_read_synthetic, v, t, truth)) for v, t in pairs]


def _read_synthetic(video: Path, truth: Path, what: str) -> tuple[np.ndarray, Any]:
    """Depth is a level: 1 for the nearest object, 2 for one behind another, 3 for the background. Key points are four
    spots fixed to each object; those that a nearer object hides are not seen; scale: the object's diameter."""
    with open_video(video.read_bytes(), video.suffix[1:]) as opened:
        shown = opened.get(np.arange(len(opened)))
    t = np.load(truth)
    masks = (
        np.unpackbits(t["masks"], count=int(np.prod(t["masks_shape"]))).reshape(t["masks_shape"]).astype(bool)
    )
    if what == "masks":
        ids = np.arange(1, masks.shape[1] + 1)
        return shown, (masks * ids[:, None, None]).sum(1).astype(np.uint8)
    if what == "depth":
        level = (masks * (1 + t["depth"] - BACKGROUND)[:, None, None]).sum(1) + BACKGROUND
        return shown, level.astype(np.float32)
    return shown, _spots(t, masks)


def _spots(truth: Mapping[str, np.ndarray], masks: np.ndarray) -> KeypointLabels:
    """masks bool [T, n, H, W]. There are always eight points, of one object the last four are never seen."""
    (frames, n, height, width), (x, y) = masks.shape, SPOTS.T
    angle, size = truth["angle"][..., None], truth["size"][..., None]
    turned = np.stack([np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y], -1)
    xy, seen, scale = np.zeros((frames, 2, 4, 2)), np.zeros((frames, 2, 4), bool), np.ones((frames, 2, 4))
    xy[:, :n] = (truth["position"][:, :, None] + size[..., None] * turned + 0.5) % (
        width,
        height,
    ) - 0.5  # on the torus
    at = np.rint(xy[:, :n]).astype(int).clip(0, (width - 1, height - 1))
    frame, owner = np.ogrid[:frames, :n]
    seen[:, :n] = masks[frame[..., None], owner[..., None], at[..., 1], at[..., 0]]
    scale[:, :n] = 2 * size
    return KeypointLabels(xy.reshape(frames, 8, 2), seen.reshape(frames, 8), scale.reshape(frames, 8))


READERS: dict[str, dict[str, Callable[[Path, str], list[DenseSample]]]] = {  # truth -> format -> reader
    "masks": {"davis": davis, "synthetic": partial(synthetic, "masks")},
    "points": {"jhmdb": jhmdb, "synthetic": partial(synthetic, "points")},
    "depth": {"nyu": nyu, "synthetic": partial(synthetic, "depth")},
}
