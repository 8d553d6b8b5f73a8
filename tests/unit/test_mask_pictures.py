"""vidssl show masks --method: what the pictures show."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.synthetic import write_video
from vidssl.core.errors import UserError
from vidssl.model.grid import Grid
from vidssl.pictures.masks import (
    HIDDEN_GREY,
    TOKEN_COLOR,
    heat_map,
    make_clip,
    method_rows,
    read_clip,
    small_config,
)

ROOT = Path(__file__).parents[2]
SMALL = ("augment.size=32", "model.patch=8", "data.frames=4")


def shown(picture: np.ndarray) -> np.ndarray:
    """bool [N]: the tokens of 2 slices x 4 x 4 that a row of 32 px frames does not leave grey."""
    frames = picture.reshape(32, 2, 33, 3)[:, :, :32].transpose(1, 0, 2, 3)
    tokens = frames.reshape(2, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    return (tokens.reshape(32, -1) != HIDDEN_GREY).any(1)


def test_context_targets_and_scores_are_drawn():
    cfg = small_config(ROOT / "configs/method/everest.yaml", *SMALL)
    rows = dict(method_rows(cfg, make_clip(cfg)))
    assert list(rows) == ["clip", "score\n(initial weights)", "mask 1\ncontext", "mask 1\ntarget"]
    context = shown(rows["mask 1\ncontext"])
    target = shown(rows["mask 1\ntarget"])
    assert context.sum() == 3 and target.sum() == 6 and not (context & target).any()


def test_corrupted_input_is_drawn_in_place_of_the_context():
    cfg = small_config(ROOT / "configs/method/maskfeat.yaml", *SMALL)
    rows = dict(method_rows(cfg, make_clip(cfg)))
    seen = rows["mask 1\nseen"].reshape(32, 2, 33, 3)
    assert (seen == TOKEN_COLOR).all(-1).sum() == 13 * 64
    assert shown(rows["mask 1\ntarget"]).sum() == 13


def test_grey_input_is_drawn_grey():
    cfg = small_config(ROOT / "configs/method/colourisation.yaml", *SMALL)
    rows = dict(method_rows(cfg, make_clip(cfg)))
    seen, clip = (rows[name].astype(int) for name in ("mask 1\nseen", "clip"))
    assert abs(seen[..., :2] - seen[..., 1:]).max() <= 1 < abs(clip[..., :2] - clip[..., 1:]).max()


def test_the_lowest_score_is_the_darkest():
    picture = heat_map(torch.arange(32.0), np.zeros((2, 32, 32, 3), np.uint8), Grid(2, 4, 4))
    frames = picture.reshape(32, 2, 33, 3).astype(int).sum(-1)
    assert frames[0, 0, 0] < frames[16, 0, 16] < frames[0, 1, 0] < frames[31, 1, 31]


def test_a_clip_is_read_as_the_data_section_cuts_it(tmp_path):
    levels = np.arange(24, dtype=np.uint8) * 10
    write_video(tmp_path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (24, 48, 64, 3)), crf=1)
    cfg = small_config(ROOT / "configs/method/videomae.yaml", *SMALL)
    clip = read_clip(tmp_path / "a.mp4", cfg)
    assert clip.shape == (3, 4, 32, 32) and cfg.data.stride == 4
    assert (clip.float().mean((0, 2, 3)).diff() - 40).abs().max() < 3


@pytest.mark.parametrize("method", ["sigma", "mvd", "mgmae", "given_tokens"])
def test_what_a_user_must_give_is_not_needed(method):
    cfg = small_config(ROOT / f"configs/method/{method}.yaml", *SMALL)
    assert "mask 1\ntarget" in dict(method_rows(cfg, make_clip(cfg)))


def test_a_method_without_a_mask_has_none_to_draw():
    cfg = small_config(ROOT / "configs/method/videomae.yaml", *SMALL)
    object.__setattr__(cfg.method, "mask", cfg.method.score)
    with pytest.raises(UserError, match="nothing behind a mask"):
        method_rows(cfg, make_clip(cfg))
