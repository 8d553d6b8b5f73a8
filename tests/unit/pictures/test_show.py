"""vidssl show: each picture from files, and mistakes in a line."""

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.synthetic import write_video
from vidssl.commands import show
from vidssl.core.errors import UserError
from vidssl.model.vit import Encoder
from vidssl.pictures.clips import read_windows
from vidssl.pictures.panels import HIDDEN_GREY
from vidssl.pictures.show import training_config
from vidssl.pretrained.files import save_weights

SIZE = {"frames": 4, "height": 32, "width": 32, "tubelet": 2, "patch": 8, "dim": 24, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """24 frames, wider than high, of rising grey."""
    path = tmp_path_factory.mktemp("video") / "rising.mp4"
    levels = np.arange(24, dtype=np.uint8) * 10
    write_video(path, np.broadcast_to(levels[:, None, None, None], (24, 48, 96, 3)), crf=1)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A file with untrained weights, of clips of 4 frames at stride 2."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(0)
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3}
    config = {"data": {"stride": 2, "fps": None}}
    save_weights(path, Encoder(**SIZE).state_dict(), {"model": SIZE, "pixels": pixels, "config": config})
    return path


def frames_of(path) -> int:
    return Image.open(path).n_frames


def test_windows_follow_each_other_and_do_not_overlap(video):
    from vidssl.evaluation.views import View

    view = View(frames=4, stride=2, fps=None, segments=1, crops=1, size=16)
    clip = read_windows(video, view, windows=4)
    assert clip.windows == 3 and clip.frames.shape == (12, 16, 16, 3)
    assert np.allclose(np.diff(clip.frames[:, 8, 8, 0].astype(int)), 20, atol=3)
    assert np.allclose(np.diff(clip.times), 2 / 12, atol=0.01) and clip.fps == pytest.approx(6, abs=0.1)
    assert clip.tensor().shape == (3, 3, 4, 16, 16)
    assert read_windows(video, view, windows=1).frames[0, 8, 8, 0] > clip.frames[0, 8, 8, 0]


def test_a_clip_plays_with_its_times(video, tmp_path):
    show.main(["clip", str(video), str(tmp_path / "a.webp")])
    show.main(["clip", str(video), str(tmp_path / "a.png")])
    assert frames_of(tmp_path / "a.webp") == 24
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 8 * 96 and height > 2 * 48


def test_draws_of_a_clip(video, tmp_path):
    files = ["configs/data/quickstart.yaml", "data.frames=4"]
    show.main(["augment", *files, "--clip", str(video), "--draws", "3", str(tmp_path / "a.webp")])
    assert frames_of(tmp_path / "a.webp") == 24
    cfg = training_config(files)
    assert cfg.data.frames == 4 and cfg.augment.arguments["size"] == 32


def test_samples_of_a_data_set_have_their_labels(synthetic_shards, tmp_path):
    show.main(["shards", str(synthetic_shards / "test"), "--clips", "7", str(tmp_path / "a.webp")])
    assert frames_of(tmp_path / "a.webp") == 12


@pytest.mark.parametrize("options", [[], ["--token", "1,2,3", "--windows", "1"]])
def test_features_of_several_videos(options, video, encoder, tmp_path):
    out = tmp_path / "a.webp"
    show.main(["features", str(encoder), str(video), str(video), *options, str(out)])
    assert frames_of(out) == (4 if options else 12)


def test_masks_play(tmp_path):
    show.main(["masks", "--method", "videomae_tiny", str(tmp_path / "a.webp")])
    image = Image.open(tmp_path / "a.webp")
    assert image.n_frames == 4
    grey = np.abs(np.asarray(image.convert("RGB")).astype(int) - HIDDEN_GREY).max(-1) < 3
    assert grey.sum() > 2000


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["clip", "none.mp4", "a.png"], "none.mp4: no such file"),
        (["clip", "README.md", "a.jpg"], "ends in .png"),
        (["clip", "README.md", "a.png"], "README.md: cannot be decoded"),
        (["shards", "docs", "a.png"], "docs: has no index.json"),
        (["attention", "docs", "README.md", "a.png"], "docs: has no probe.json"),
        (["features", "none", "README.md", "a.png"], "none"),
        (["features", "docs", "README.md", "--token", "1,2", "a.png"], "--token 1,2: give time slice"),
        (["augment", "data.frames=4", "--clip", "README.md", "--draws", "0", "a.png"], "--draws 0"),
    ],
)
def test_mistakes(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        show.main([*arguments[:-1], str(tmp_path / arguments[-1])])
    assert not list(tmp_path.iterdir())


def test_a_token_beyond_the_grid_is_named(video, encoder, tmp_path):
    with pytest.raises(UserError, match="6 slices of 4 x 4 tokens"):
        show.main(["features", str(encoder), str(video), "--token", "0,4,0", str(tmp_path / "a.png")])
