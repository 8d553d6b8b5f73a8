"""Dense frozen evaluation: figures against brute force, known motion, readers of the published formats."""

import csv
import json
import math
import os
import signal
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from program_ends import ctrl_c, disk_full, sigterm

from vidssl import dense
from vidssl.config import load_config
from vidssl.core.errors import Interrupted, Preempted, UserError
from vidssl.core.log import configure_logging
from vidssl.data import isolation
from vidssl.evaluation.dense.datasets import NYU_SIZE, READERS, DenseSample, KeypointLabels, data_hash
from vidssl.evaluation.dense.depth import Depth, depth_errors, log_loss
from vidssl.evaluation.dense.frames import DenseProtocol, FrameEncoder, encode_layers, make_frame_encoder
from vidssl.evaluation.dense.isolated_samples import isolated
from vidssl.evaluation.dense.propagation import (
    Keypoints,
    Masks,
    PropagationSettings,
    boundary_f,
    jaccard,
    propagate,
)
from vidssl.evaluation.dense.schema import DenseConfig
from vidssl.model.heads import DepthHead
from vidssl.model.vit import Encoder
from vidssl.pretrained.files import save_native
from vidssl.pretrained.infer_config import Checkpoint
from vidssl.pretrained.load import LoadedEncoder, load_encoder

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
MODEL = {"frames": 4, "height": 48, "width": 48, "dim": 24, "depth": 2, "heads": 2, "patch": 8, "tubelet": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tiny untrained encoder."""
    out = tmp_path_factory.mktemp("dense") / "run"
    out.mkdir()
    torch.manual_seed(0)
    save_native(out, Checkpoint("vidssl", MODEL, Encoder(**MODEL, class_token=False).state_dict()), {})
    return out


def make_encoder(
    encode=lambda video: None, clip=4, tubelet=2, patch=8, size=16, batch=2, stills=False
) -> FrameEncoder:
    return FrameEncoder(encode, clip, tubelet, patch, size, batch, stills, False, CPU)


# Figures


def slow_boundary(mask: np.ndarray) -> set[tuple[int, int]]:
    h, w = mask.shape
    out = set()
    for y in range(h):
        for x in range(w):
            near = [mask[min(y + dy, h - 1), min(x + dx, w - 1)] for dy, dx in ((0, 1), (1, 0), (1, 1))]
            if any(n != mask[y, x] for n in near):
                out.add((y, x))
    return out


def slow_boundary_f(guess: np.ndarray, truth: np.ndarray) -> float:
    a, b = slow_boundary(guess), slow_boundary(truth)
    radius = math.ceil(0.008 * math.hypot(*truth.shape))

    def close(p: tuple[int, int], points: set[tuple[int, int]]) -> bool:
        return any((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 <= radius**2 for q in points)

    precision = sum(close(p, b) for p in a) / len(a) if a else 1.0
    recall = sum(close(p, a) for p in b) / len(b) if b else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_j_and_f_equal_brute_force():
    rng = np.random.default_rng(0)
    soft = rng.normal(size=(2, 6, 30, 170)).cumsum(2).cumsum(3)  # 170 wide: a disc of radius 2
    guess, truth = soft > np.median(soft)
    guess[4], guess[5], truth[5] = False, False, False  # one is missed, one is in neither
    j, f = (fn(torch.from_numpy(guess), torch.from_numpy(truth)).numpy() for fn in (jaccard, boundary_f))
    for i in range(6):
        union = (guess[i] | truth[i]).sum()
        assert j[i] == pytest.approx((guess[i] & truth[i]).sum() / union if union else 1.0)
        assert f[i] == pytest.approx(slow_boundary_f(guess[i], truth[i]))
    assert j[4] == f[4] == 0 and j[5] == f[5] == 1 and 0.05 < f[0] < 0.95


def test_f_of_a_shifted_square():
    truth = torch.zeros(1, 50, 50, dtype=torch.bool)  # diagonal 71: a disc of radius 1
    truth[0, 10:30, 10:30] = True
    assert boundary_f(truth.roll(1, 2), truth).item() == 1
    assert jaccard(truth.roll(1, 2), truth).item() == pytest.approx(19 / 21)
    assert boundary_f(truth.roll(3, 2), truth).item() < 0.7  # the two vertical sides are lost


def test_depth_errors_and_loss_by_hand():
    truth = torch.tensor([[[1.0, 2.0], [4.0, 0.0]], [[0.0, 0.0], [0.0, 11.0]]])
    guess = torch.tensor([[[1.0, 3.0], [4.8, 9.0]], [[1.0, 1.0], [1.0, 1.0]]])
    rows = depth_errors(guess, truth, 10.0)
    assert rows[0] == pytest.approx([math.sqrt(1.64 / 3), (0.5 + 0.2) / 3, 2 / 3])
    assert np.isnan(rows[1]).all()  # what is unknown or too deep does not count
    ratio = np.log([1.0 + 1e-3, 3.0 + 1e-3, 4.8 + 1e-3]) - np.log([1.0 + 1e-3, 2.0 + 1e-3, 4.0 + 1e-3])
    wanted = math.sqrt(ratio.var(ddof=1) + 0.15 * ratio.mean() ** 2)
    assert log_loss(guess, truth, 10.0).item() == pytest.approx(wanted, rel=1e-4)


# Propagation


def slow_propagate(x: np.ndarray, first: np.ndarray, s: PropagationSettings) -> np.ndarray:
    t, h, w, _ = x.shape
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    labels = [first]
    for i in range(1, t):
        out = np.zeros_like(first)
        for y in range(h):
            for z in range(w):
                known = []
                for k in {0, *range(max(0, i - s.context_frames), i)}:
                    for a in range(max(0, y - s.radius), min(h, y + s.radius + 1)):
                        for b in range(max(0, z - s.radius), min(w, z + s.radius + 1)):
                            known.append((float(x[i, y, z] @ x[k, a, b]), labels[k][:, a, b]))
                known = sorted(known, key=lambda pair: -pair[0])[: s.topk]
                weight = np.exp(np.array([c for c, _ in known]) / s.temperature)
                out[:, y, z] = (weight[:, None] * np.stack([v for _, v in known])).sum(0) / weight.sum()
        labels.append(out)
    return np.stack(labels)


@pytest.mark.parametrize(
    "setting",
    [
        PropagationSettings(5, 0.1, 1, 2),
        PropagationSettings(3, 0.5, 9, 0),
        PropagationSettings(200, 0.05, 1, 7),
    ],
)
def test_propagation_equals_brute_force(setting):
    """Few, none and all earlier frames beside the first; a window smaller and larger than the grid; more than
    all."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 3, 4, 6))
    first = rng.uniform(size=(2, 3, 4))
    found = propagate(torch.from_numpy(x), torch.from_numpy(first), setting)
    assert np.allclose(found.numpy(), slow_propagate(x, first, setting), atol=1e-9)


def moving_square(perfect: bool, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Tokens f32 [8, 12, 12, 16] of patches of 4 px, and ids u8 [8, 48, 48] of a square of 4 x 4 tokens that
    moves one token a frame over a still background."""
    rng = torch.Generator().manual_seed(seed)
    if not perfect:
        tokens = torch.randn(8, 12, 12, 16, generator=rng)
    else:
        tokens = torch.randn(12, 12, 16, generator=rng).expand(8, -1, -1, -1).clone()
        body = torch.randn(4, 4, 16, generator=rng)
    ids = np.zeros((8, 48, 48), np.uint8)
    for t in range(8):
        ids[t, 16:32, 4 * t : 4 * t + 16] = 1
        if perfect:
            tokens[t, 4:8, t : t + 4] = body
    return tokens, ids


def test_masks_follow_a_square_with_perfect_features_only():
    task = Masks()
    setting = PropagationSettings(1, 0.1, 12, 2)
    tokens, ids = moving_square(True)
    ((j, f),) = task.evaluate_sequence(tokens, ids, (48, 48), setting)
    assert j > 0.95 and f > 0.93  # bilinear upsampling rounds the corners
    ids[:, :12, 8:32] = 2  # another, which stays
    rows = task.evaluate_sequence(tokens, ids, (48, 48), setting)
    assert rows.shape == (2, 2) and rows.min() > 0.85
    tokens, ids = moving_square(False)
    ((j, f),) = task.evaluate_sequence(tokens, ids, (48, 48), setting)
    chance = 16 * 16 / 48**2
    assert j < 2 * chance


def test_first_and_last_frames_and_later_objects_do_not_count():
    tokens, ids = moving_square(True)
    setting = PropagationSettings(1, 0.1, 12, 2)
    before = Masks().evaluate_sequence(tokens, ids, (48, 48), setting)
    ids[-1], ids[3:, :8, :8] = 0, 2
    assert np.allclose(before, Masks().evaluate_sequence(tokens, ids, (48, 48), setting))


def test_mask_summary_averages_objects_and_resamples_sequences():
    rows = [np.array([[1.0, 0.5], [0.0, 0.5]]), np.array([[0.5, 0.2]])]
    summary = Masks().summarise(rows, ["a", "b"])
    assert (summary["J"], summary["F"], summary["objects"]) == (50.0, 40.0, 3)
    assert summary["value"] == 45.0 and summary["ci95"] == [35.0, 50.0]  # sequence b alone, a alone


def test_pck_by_hand():
    """One point is on the square, one on the background; by the labels both move a token of 4 px a
    frame."""
    tokens, _ = moving_square(True)
    xy = np.zeros((8, 2, 2))
    xy[:, 0] = [(4 * t + 5.5, 21.5) for t in range(8)]  # the middle of a token of the square
    xy[:, 1] = [(41.5 - 4 * t, 9.5) for t in range(8)]  # on the background, which does not move
    seen = np.ones((8, 2), bool)
    seen[5, 0] = False
    truth = KeypointLabels(xy, seen, np.full((8, 2), 41.0))
    rows = Keypoints().evaluate_sequence(tokens, truth, (48, 48), PropagationSettings(1, 0.1, 2, 7))
    assert rows.tolist() == [
        [6, 6, 6],
        [1, 2, 7],
    ]  # of point 1: off by 4, 8, 12 ... px; allowed are 4.1 and 8.2
    summary = Keypoints().summarise([rows], ["a"])
    assert summary["value"] == pytest.approx(100 * (6 / 6 + 1 / 7) / 2, abs=1e-3)
    assert (
        summary["PCK@0.2"] == pytest.approx(100 * (6 / 6 + 2 / 7) / 2, abs=1e-3) and summary["points"] == 13
    )
    still = KeypointLabels(
        np.full((8, 1, 2), (42.7, 10.7)), np.ones((8, 1), bool), np.full((8, 1), 3.0)
    )  # 0.3 tokens off one
    assert Keypoints().evaluate_sequence(
        tokens, still, (48, 48), PropagationSettings(1, 0.1, 2, 7)
    ).tolist() == [[7, 7, 7]]  # 0.3 px off
    seen[0, 1] = False  # a point that the first frame does not show is not evaluated
    assert Keypoints().evaluate_sequence(tokens, truth, (48, 48), PropagationSettings(1, 0.1, 2, 7))[
        1
    ].tolist() == [
        0,
        0,
        0,
    ]


# Frames of an encoder of clips


def test_a_frame_has_the_tokens_of_its_tubelet():
    """The encoder here returns for each token its mean gray level and the number of its tubelet."""

    def encode(video: torch.Tensor) -> torch.Tensor:
        b, _, t, h, w = video.shape
        x = video.float().view(b, 3, t // 2, 2, h // 8, 8, w // 8, 8).mean((1, 3, 5, 7))
        return torch.stack([x, torch.arange(t // 2).view(1, -1, 1, 1).expand_as(x)], -1).flatten(1, 3)

    frames = np.zeros((7, 20, 42, 3), np.uint8)
    frames += (10 * np.arange(7, dtype=np.uint8))[:, None, None, None]
    frames[:, :, 21:] += 100  # the right half
    tokens = make_encoder(encode)(frames)
    assert tokens.shape == (7, 2, 4, 2)  # 16 px, and 33.6 px cut to 32
    assert tokens[:, 0, 0, 0].tolist() == [5, 5, 25, 25, 45, 45, 60]  # the last frame fills its window
    assert tokens[:, 1, 3, 0].tolist() == [105, 105, 125, 125, 145, 145, 160]
    assert tokens[:, 0, 0, 1].tolist() == [0, 0, 1, 1, 0, 0, 1]
    still = make_encoder(lambda video: torch.full((1, 8, 1), video.shape[2]), stills=True)
    assert still(frames[:1]).unique().item() == 1  # an image is one frame


def test_layers_are_concatenated_and_the_last_is_the_output():
    torch.manual_seed(0)
    encoder = Encoder(**MODEL, class_token=True).eval()
    video = torch.randn(1, 3, 4, 48, 48)
    with torch.no_grad():
        both = encode_layers(encoder, video, (0, 1))
        last = encode_layers(encoder, video, ())
    assert both.shape == (1, 72, 48) and torch.equal(both[..., 24:], last)
    assert not torch.allclose(both[..., :24], last)
    assert not encoder.blocks[0]._forward_hooks


def test_controls_are_other_encoders(run):
    loaded = load_encoder(str(run))
    encoder = {}
    frames = np.random.default_rng(0).integers(0, 255, (5, 24, 24, 3), np.uint8)
    for control in ("none", "random_init", "pixels"):
        options = DenseProtocol(size=24, seed=3)
        seen, name = make_frame_encoder(
            lambda seed: load_encoder(str(run), seed), loaded, control, options, CPU
        )
        encoder[control] = seen(frames), name
    assert len({name for _, name in encoder.values()}) == 3
    assert encoder["pixels"][0].shape == (5, 3, 3, 96) and encoder["none"][0].shape == (5, 3, 3, 24)
    model = {"frames": 2, "height": 16, "width": 16, "tubelet": 1, "patch": 8}
    metadata = {"model": model, "pixels": loaded.metadata["pixels"]}
    other = LoadedEncoder(torch.nn.Flatten(2), metadata)  # type: ignore[arg-type]
    other.encoder.forward = lambda video: torch.ones(len(video), 2 * 9, 5)
    seen, _ = make_frame_encoder(lambda seed: other, other, "none", DenseProtocol(size=24), CPU)
    assert seen(np.zeros((3, 24, 48, 3), np.uint8)).shape == (3, 3, 3, 5)  # of another library: squares
    with pytest.raises(UserError, match="encoder of ours"):
        make_frame_encoder(lambda seed: other, other, "none", DenseProtocol(size=24, layers=(0,)), CPU)
    grey = (
        frames[:1, :2, :2, 0].mean() / 255 - 0.485
    ) / 0.229  # red of the first sixteenth of the first patch
    assert encoder["pixels"][0][0, 0, 0, 0].item() == pytest.approx(grey, abs=1e-3)


# Depth


def make_sample(name: str, frames: np.ndarray, truth: object) -> DenseSample:
    return DenseSample(name, name, (Path(name),), lambda: (frames, truth))


class RecordingDepth(Depth):
    """Records the rows on which heads are trained, and the number of frames on which they are compared."""

    rows: ClassVar[list[list[int]]] = []
    compared: ClassVar[list[int]] = []

    def train_heads(self, encoder, tokens, depth, rows, rates):
        self.rows.append(rows.tolist())
        return super().train_heads(encoder, tokens, depth, rows, rates)

    def head_errors(self, encoder, head, tokens, depth):
        self.compared.append(len(tokens))
        return super().head_errors(encoder, head, tokens, depth)


def test_depth_head_learns_and_lr_is_selected_on_held_out_train():
    """Tokens are two colours, depth is 1 + 3 * the first; a rate of 1e-6 learns nothing."""
    rng = np.random.default_rng(0)
    samples = []
    for n in range(20):
        x = np.broadcast_to(rng.integers(0, 256, (2, 1, 1, 3)), (2, 48, 48, 3)).astype(np.uint8)
        samples.append(make_sample(str(n), x, (1 + 3 * (x[..., 0] / 255)).astype(np.float32)))

    def encode(video: torch.Tensor) -> torch.Tensor:
        patches = (video.float() / 255).view(len(video), 3, 1, 6, 8, 6, 8)
        return patches.mean((4, 6)).flatten(2).mT

    encoder = make_encoder(encode, clip=1, tubelet=1, size=48)
    task = RecordingDepth(lr=(1e-6, 0.03), epochs=40, batch=8, bins=16, max_depth=5.0, weight_decay=0.0)
    head, chosen = task.select_model(encoder, samples[:14])
    assert chosen["lr"] == 0.03 and [t["lr"] for t in chosen["tried"]] == [1e-6, 0.03]
    assert chosen["tried"][1]["held_out_rmse"] < 0.2 < 0.5 < chosen["tried"][0]["held_out_rmse"]
    first, last = task.rows
    assert (
        len(first) == 22 and len({row // 2 for row in first}) == 11
    )  # three sequences of 14 are out, as a whole
    assert last == list(range(28)) and task.compared == [6, 6]
    summary = task.summarise(
        [task.evaluate(encoder, head, sample) for sample in samples[14:]],
        [sample.group for sample in samples[14:]],
    )
    assert summary["value"] < 0.2 and summary["abs_rel"] < 0.1 and summary["delta_1.25"] > 85
    assert summary["ci95"][0] <= summary["value"] <= summary["ci95"][1]


def test_depth_is_averaged_over_frames_not_over_sequences():
    """Of sequences of one and of three frames each frame counts the same."""
    rows = [np.array([[4.0, 0.4, 0.0]]), np.array([[1.0, 0.1, 1.0]] * 3)]
    summary = Depth().summarise(rows, ["a", "b"])
    assert (summary["value"], summary["abs_rel"], summary["delta_1.25"]) == (1.75, 0.175, 75.0)


def test_depth_bins_cover_the_range():
    head = DepthHead(3, 5, 4.0)
    torch.nn.init.zeros_(head.linear.weight)
    head.linear.bias.data = torch.tensor([-1.0, -1, -1, -1, 1e6])
    assert head(torch.zeros(1, 2, 2, 3)).unique().item() == pytest.approx(4.0, abs=1e-3)


# Readers


def write_davis(root: Path, sequences: dict[str, str]) -> None:
    """sequences: name -> val or train. Two squares, of ids 1 and 2, and a pixel of void."""
    (root / "ImageSets/2017").mkdir(parents=True)
    for split in ("train", "val"):
        names = [n for n, s in sequences.items() if s == split]
        (root / f"ImageSets/2017/{split}.txt").write_text("\n".join(names) + "\n")
    for k, name in enumerate(sequences):
        for folder in ("JPEGImages", "Annotations"):
            (root / folder / "480p" / name).mkdir(parents=True)
        for t in range(4):
            ids = np.zeros((48, 80), np.uint8)
            ids[8:24, 8 + 2 * t : 24 + 2 * t], ids[24:40, 48:72], ids[0, 0] = 1, 2, 255
            shown = np.random.default_rng(k).integers(0, 60, (48, 80, 3)).astype(np.uint8)
            shown += (90 * (ids % 255))[..., None]
            Image.fromarray(shown).save(root / f"JPEGImages/480p/{name}/{t:05d}.jpg", quality=95)
            picture = Image.fromarray(ids, "P")
            picture.putpalette([7 * n % 256 for n in range(768)])
            picture.save(root / f"Annotations/480p/{name}/{t:05d}.png")


@pytest.fixture(scope="module")
def davis_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("davis")
    write_davis(root, {"bear": "train", "dog": "train", "cow": "val", "goat": "val"})
    return root


def test_davis_reader(davis_folder):
    samples = READERS["masks"]["davis"](davis_folder, "test")
    assert [i.name for i in samples] == ["cow", "goat"]
    frames, ids = samples[0].load()
    assert frames.shape == (4, 48, 80, 3) and frames.dtype == ids.dtype == np.uint8
    assert sorted(np.unique(ids)) == [0, 1, 2] and (ids[1] == 1).sum() == 256 and ids[1, 8, 10] == 1
    assert frames[0][ids[0] == 2].mean() > frames[0][ids[0] == 1].mean() > frames[0][ids[0] == 0].mean() + 50


def test_jhmdb_reader(tmp_path):
    scipy_io = pytest.importorskip("scipy.io", reason="scipy reads JHMDB's joint_positions.mat")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/clap_test_split1.txt").write_text("a.avi 1 \nb.avi 2 \n")
    xy = np.full((2, 15, 3), 1.0)  # from 1 on: the upper left pixel
    xy[:, 1] = [[31], [41]]  # joint 1 is at (30, 40) of 64 x 48
    xy[0, 2] = -5  # joint 2 is left of the image
    for name in ("a", "b"):
        (tmp_path / "Rename_Images/clap" / name).mkdir(parents=True)
        (tmp_path / "joint_positions/clap" / name).mkdir(parents=True)
        scipy_io.savemat(tmp_path / f"joint_positions/clap/{name}/joint_positions.mat", {"pos_img": xy})
        for t in range(4):  # one more than there are positions of
            Image.new("RGB", (64, 48), (t, 0, 0)).save(
                tmp_path / f"Rename_Images/clap/{name}/{t + 1:05d}.png"
            )
    reader = READERS["keypoints"]["jhmdb"]
    assert [i.name for i in reader(tmp_path, "train")] == ["clap/a"]
    (sample,) = reader(tmp_path, "test")
    frames, truth = sample.load()
    assert (
        sample.name == "clap/b"
        and frames.shape == (3, 48, 64, 3)
        and frames[:, 0, 0, 0].tolist() == [0, 1, 2]
    )
    assert (
        truth.xy.shape == (3, 15, 2)
        and truth.xy[0, 1].tolist() == [30, 40]
        and truth.xy[0, 0].tolist() == [0, 0]
    )
    assert not truth.visible[:, 2].any() and truth.visible[:, [0, 1, 3]].all()
    assert np.allclose(truth.scale, 0.6 * 50)


def test_nyu_reader(tmp_path):
    """16-bit millimetres and 8-bit fractions of 10 m; test images of the published size count inside Eigen's
    crop."""
    (tmp_path / "data/kitchen_out").mkdir(parents=True)
    deep = np.full(NYU_SIZE, 2500, np.uint16)
    Image.fromarray(deep).save(tmp_path / "data/0_depth.png")
    Image.new("RGB", NYU_SIZE[::-1], (9, 8, 7)).save(tmp_path / "data/0_colors.png")
    Image.new("L", (20, 16), 51).save(tmp_path / "data/kitchen_out/1.png")
    Image.new("RGB", (20, 16)).save(tmp_path / "data/kitchen_out/1.jpg")
    (tmp_path / "data/nyu2_test.csv").write_text("data/0_colors.png,data/0_depth.png\n")
    (tmp_path / "data/nyu2_train.csv").write_text("data/kitchen_out/1.jpg,data/kitchen_out/1.png\n")
    reader = READERS["depth"]["nyu"]
    (train,), (test,) = reader(tmp_path, "train"), reader(tmp_path, "test")
    assert (
        train.group == "kitchen_out"
        and np.allclose(train.load()[1], 2.0)
        and train.load()[1].shape == (1, 16, 20)
    )
    frames, metres = test.load()
    assert frames.shape == (1, *NYU_SIZE, 3) and frames[0, 0, 0].tolist() == [9, 8, 7]
    assert set(np.unique(metres)) == {0, 2.5} and (metres > 0).sum() == (471 - 45) * (601 - 41)
    assert metres[0, 45, 41] == metres[0, 470, 600] == 2.5 and metres[0, 44, 41] == 0


def test_synthetic_masks_depth_and_keypoints_agree(synthetic_corpus):
    """Depth and masks agree; a visible key point is on its object, and moves and rotates with it."""
    found = {what: READERS[what]["synthetic"](synthetic_corpus, "test") for what in READERS}
    assert len(found["masks"]) == 30 and len(READERS["masks"]["synthetic"](synthetic_corpus, "train")) == 60
    visible = []
    for n in range(0, 30, 3):
        (frames, ids), (_, level), (_, points) = (
            found[what][n].load() for what in ("masks", "depth", "keypoints")
        )
        assert frames.shape == (*ids.shape, 3) and ids.shape == (24, 48, 48)
        assert ((level == 3) == (ids == 0)).all()
        # The first of the truth is the farther one
        assert (level[ids == 1] == 2).all() and (level[ids == 2] == 1).all()
        t, j = np.nonzero(points.visible)
        x, y = np.rint(points.xy[t, j]).astype(int).T
        assert (ids[t, y, x] == 1 + j // 4).all()
        visible.append(len(t))
    assert np.mean(visible) > 60
    changes = []
    for sample in (
        found["keypoints"][n] for n in (4, 5, 14, 15, 24, 25)
    ):  # these spin: a spot keeps its colour
        frames, points = sample.load()
        for j in np.flatnonzero(points.visible.sum(0) > 10):
            x, y = np.rint(points.xy[points.visible[:, j], j]).astype(int).clip(0, 47).T
            changes.append(frames[points.visible[:, j]][np.arange(len(x)), y, x].std(0).mean())
    assert len(changes) > 10 and np.median(changes) < 10  # 4 levels; 44 if they turned the other way


def test_data_hash_covers_the_files_that_are_read(davis_folder, tmp_path):
    read = READERS["masks"]["davis"]
    write_davis(tmp_path / "b", {"bear": "train", "dog": "train", "cow": "val", "goat": "val"})
    one, two = (data_hash(folder, read(folder, "test")) for folder in (davis_folder, tmp_path / "b"))
    assert one == two != data_hash(davis_folder, read(davis_folder, "train"))
    (tmp_path / "b/README").write_text("new")
    assert data_hash(tmp_path / "b", read(tmp_path / "b", "test")) == one
    (tmp_path / "b/Annotations/480p/cow/00003.png").write_bytes(b"other")
    assert data_hash(tmp_path / "b", read(tmp_path / "b", "test")) != one
    with pytest.raises(UserError, match=r"it or its labels cannot be read.*00003\.png"):
        read(tmp_path / "b", "test")[0].load()


# End to end


def arguments(run: Path, data: Path, out: Path, *more: str, file: str = "propagation") -> list[str]:
    return [
        str(ROOT / f"configs/dense/{file}.yaml"),
        f"encoder={run}",
        f"data.test={data}",
        f"out={out}",
        *more,
    ]


def test_masks_end_to_end(run, davis_folder, tmp_path):
    """Settings are selected on train alone, the report equals the table of sequences, the test set is read
    once."""
    small = ["task.size=48", "task.topk=[1,5]", "task.temperature=[0.1]", "task.radius=[1]"]
    dense.main(arguments(run, davis_folder, tmp_path / "a", *small))
    report = json.loads((tmp_path / "a/dense.json").read_text())
    with open(tmp_path / "a/sequences.csv", newline="") as f:
        table = list(csv.DictReader(f))
    assert [r["control"] for r in report["results"]] == ["none", "random_init", "pixels"]
    for row in report["results"]:
        mine = [t for t in table if t["control"] == row["control"]]
        assert [(t["sequence"], t["row"]) for t in mine] == [
            ("cow", "0"),
            ("cow", "1"),
            ("goat", "0"),
            ("goat", "1"),
        ]
        for name in ("J", "F"):
            assert row[name] == pytest.approx(100 * np.mean([float(t[name]) for t in mine]), abs=1e-2)
        assert row["value"] == pytest.approx((row["J"] + row["F"]) / 2, abs=1e-3) and row["n_train"] == 2
        assert row["ci95"][0] - 0.01 <= row["value"] <= row["ci95"][1] + 0.01
        tried = row["chosen"]["tried"]
        assert [t["topk"] for t in tried] == [1, 5]
        assert row["chosen"]["topk"] == max(tried, key=lambda t: t["train"])["topk"]
    assert report["results"][2]["value"] > 60  # the squares are of other colours: pixels find them
    assert (
        len(report["encoder"]["sha256"]) == len(report["data"]["test"]) == len(report["config_sha256"]) == 64
    )
    with pytest.raises(UserError, match="a test set is evaluated once"):
        dense.main(arguments(run, davis_folder, tmp_path / "a", *small))

    other = tmp_path / "other"
    write_davis(other, {"bear": "train", "dog": "train", "cow": "val", "goat": "val"})
    for path in (other / "Annotations/480p/cow").glob(
        "*.png"
    ):  # another truth of test changes nothing but figures
        Image.fromarray(np.asarray(Image.open(path))[::-1].copy(), "P").save(path)
    dense.main(arguments(run, other, tmp_path / "b", *small, "task.controls=[none]"))
    (again,) = json.loads((tmp_path / "b/dense.json").read_text())["results"]
    first = report["results"][0]
    assert again["chosen"] == first["chosen"] and again["value"] != first["value"]


@pytest.mark.parametrize("kind", ["keypoints", "depth"])
def test_keypoints_and_depth_end_to_end(kind, run, synthetic_corpus, tmp_path):
    """On the synthetic corpus; chance does not reach the depth of the nearest object."""
    more = [
        "data.max_train_sequences=8",
        "task.size=48",
        "data.format=synthetic",
        "task.controls=[none,pixels]",
    ]
    if kind == "depth":
        more += [
            "task.max_depth=4",
            "task.epochs=3",
            "task.bins=16",
            "task.lr=[1e-2,1e-5]",
            "task.layers=[0,1]",
        ]
    else:
        more += ["task.topk=[5]", "task.temperature=[0.1]", "task.radius=[2]", "task.context_frames=[2]"]
    dense.main(arguments(run, synthetic_corpus, tmp_path / "a", *more, file=kind))
    report = json.loads((tmp_path / "a/dense.json").read_text())
    with open(tmp_path / "a/sequences.csv", newline="") as f:
        table = list(csv.DictReader(f))
    for row in report["results"]:
        mine = [t for t in table if t["control"] == row["control"]]
        assert (row["n_train"], row["n_test"]) == (8, 30) == (8, len({t["sequence"] for t in mine}))
        if kind == "depth":
            assert row["value"] == pytest.approx(np.mean([float(t["rmse"]) for t in mine]), abs=1e-3)
            assert row["chosen"]["lr"] == min(row["chosen"]["tried"], key=lambda t: t["held_out_rmse"])["lr"]
            assert 0 < row["value"] < 2
        else:
            joints = [[t for t in mine if t["row"] == str(j)] for j in range(8)]
            sums = [[sum(float(t[c]) for t in some) for c in ("within_0.1", "evaluated")] for some in joints]
            assert row["value"] == pytest.approx(100 * np.mean([a / b for a, b in sums if b]), abs=1e-2)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["data.format=nyu"], "no 'nyu' with masks; there is davis, synthetic"),
        (["data.test=nowhere"], "nowhere: no such folder"),
        (["data.train=tests"], "train.txt: no such file"),
        (["task.size=30"], "task.size: 30 is not a multiple"),
        (["task.frames=3"], "task.frames: 3 is not a multiple"),
        (["task.layers=[1,2]"], "task.layers [1, 2]"),
        (["task.kind=flow"], "no kind 'flow'"),
        (["task.topk=[]"], "at least 1 item"),
        (["out=README.md/x"], "README.md is not a folder"),
        (["data.decode_timeout_s=0"], "greater than 0"),
    ],
)
def test_wrong_calls(wrong, words, run, davis_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as e:
        dense.main(arguments(run, davis_folder, tmp_path / "out", "task.size=24", *wrong))
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        (sigterm, Preempted, "SIGTERM: kept: 1 finished rows are in"),
        (ctrl_c, Interrupted, "interrupted: kept: 1 finished rows are in"),
        (disk_full, OSError, "No space left"),
    ],
)
def test_an_early_end_keeps_rows_and_the_same_command_goes_on(
    end, error, words, run, davis_folder, tmp_path, monkeypatch, capfd
):
    """It ends at a sequence of the second control; then only that control is computed again."""
    single = ["task.topk=[1]", "task.temperature=[0.1]", "task.radius=[1]", "task.controls=[none,pixels]"]
    call = arguments(run, davis_folder, tmp_path / "out", "task.size=48", *single)
    calls = []
    original = Masks.evaluate

    def evaluate(*args):
        calls.append(args)
        if len(calls) == 4:
            end()
        return original(*args)

    monkeypatch.setattr(Masks, "evaluate", evaluate)
    configure_logging()
    with pytest.raises(error, match=words):
        dense.main(call)
    assert (end is disk_full) == ("kept: 1 finished rows are in" in capfd.readouterr().err)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"finished.jsonl"}
    with pytest.raises(UserError, match="of another evaluation"):
        dense.main([*call, "task.seed=3"])
    dense.main([*call, "data.decode_timeout_s=99"])
    assert len(calls) == 4 + 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"dense.json", "sequences.csv"}
    report = json.loads((tmp_path / "out/dense.json").read_text())
    assert [r["control"] for r in report["results"]] == ["none", "pixels"]
    assert [r["n_test"] for r in report["results"]] == [2, 2]


def kill_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory() -> None:
    raise MemoryError


def broken_file() -> None:
    raise ValueError("no image")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (kill_process, r"b\.png: it or its labels cannot be read: .* ended with -9"),
        (out_of_memory, r"b\.png: .* out of memory"),
        (broken_file, r"b\.png: it or its labels cannot be read: no image$"),
        (signal.pause, r"b\.png: .* no answer in 0\.3 s"),
    ],
)
def test_a_file_that_ends_its_decoder_is_an_error_with_its_name(fault, words):
    def read() -> tuple[np.ndarray, KeypointLabels]:
        return np.ones((2, 3), np.uint8), KeypointLabels(*np.arange(3.0)[:, None])

    def fail() -> tuple[np.ndarray, None]:
        fault()
        raise AssertionError

    samples = [DenseSample(n, n, (Path(f"{n}.png"),), f) for n, f in (("a", read), ("b", fail))]
    with isolated({"train": [], "test": samples}, 0.3 if fault is signal.pause else 60, 100) as splits:
        good, bad = splits["test"]
        with pytest.raises(UserError, match=words):
            bad.load()
        frames, points = good.load()
        assert frames.tolist() == [[1, 1, 1]] * 2 and points.scale.tolist() == [2]


def test_the_child_that_decodes_is_started_before_the_encoder_is_opened(
    run, davis_folder, tmp_path, monkeypatch
):
    order = []
    start_child, open_encoder = isolation.start_child, dense.open_encoder
    monkeypatch.setattr(isolation, "start_child", lambda *a: order.append("child") or start_child(*a))
    monkeypatch.setattr(
        dense, "open_encoder", lambda *a, **k: order.append("encoder") or open_encoder(*a, **k)
    )
    with pytest.raises(UserError, match="is not a multiple of the encoder's patch: give 24 or 32"):
        dense.main(arguments(run, davis_folder, tmp_path / "out", "task.size=30"))
    assert order == ["child", "encoder"]


def test_learning_rates_without_groups_to_hold_out_are_an_error_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "open_encoder", None)
    samples = [make_sample(f"{n}", np.zeros((1, 8, 8, 3)), None)._replace(group="one") for n in range(4)]
    monkeypatch.setattr(dense, "read_sequences", lambda *a: {"train": samples, "test": samples})
    with pytest.raises(UserError, match=r"no group of train can be held out to select task\.lr"):
        dense.main(arguments(run, tmp_path, tmp_path / "out", "data.format=nyu", file="depth"))
    assert not (tmp_path / "out").exists()


def test_a_test_sequence_in_train_is_an_error(run, tmp_path):
    write_davis(tmp_path / "d", {"bear": "train", "cow": "val"})
    (tmp_path / "d/ImageSets/2017/train.txt").write_text("bear\ncow\n")
    with pytest.raises(UserError, match="are in train and in test"):
        dense.main(arguments(run, tmp_path / "d", tmp_path / "out", "task.size=48"))


def test_dense_configurations_are_valid():
    for path in sorted((ROOT / "configs/dense").glob("*.yaml")):
        cfg = load_config([str(path), "encoder=x", "data.test=y", "out=z"], DenseConfig)
        assert cfg.data.format in READERS[cfg.task.build().label]
