"""Panels in rows become an animation or a still picture."""

import io

import numpy as np
import pytest
from PIL import Image

from vidssl.core.errors import UserError
from vidssl.pictures.formats import check_picture_name
from vidssl.pictures.panels import (
    BACKGROUND,
    PanelRow,
    VideoPanel,
    encode_animation,
    enlarge,
    mark_frames,
    play,
    spread,
    write_panels,
)


def levels(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames u8 [count, height, width, 3] of rising grey."""
    return np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None] * 20, (count, height, width, 3)
    )


def test_panels_play_together_at_their_aspect_ratio():
    rows = [PanelRow("clip", [VideoPanel("long", levels(4)), VideoPanel("short", levels(2) + np.uint8(100))])]
    frames = play(rows, side=32)
    assert len(frames) == 4
    for i, frame in enumerate(frames):
        for level, count in ((20 * i, 32 * 48), (100 + 20 * (i // 2), 32 * 48)):
            assert (frame == level).all(-1).sum() >= count


def test_a_name_is_written_once_above_its_column():
    rows = [PanelRow("", [VideoPanel("name", levels(1))]), PanelRow("", [VideoPanel("name", levels(1))])]
    once = play(rows, side=32).shape[1]
    rows[1].panels[0] = VideoPanel("other", levels(1))
    assert play(rows, side=32).shape[1] > once


def test_a_still_picture_has_all_frames_beside_each_other():
    picture = spread([PanelRow("", [VideoPanel("x", levels(3) + np.uint8(30))])], side=32)
    found = [(picture == 30 + 20 * i).all(-1).nonzero()[1].min() for i in range(3)]
    assert found == sorted(found) and found[1] - found[0] == found[2] - found[1] > 48


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_an_animation_plays_for_ever_and_rests_at_the_end(suffix):
    image = Image.open(io.BytesIO(encode_animation(levels(3), 5, suffix)))
    assert image.n_frames == 3 and image.info["loop"] == 0
    durations = []
    for number in range(3):
        image.seek(number)
        image.load()
        durations.append(image.info["duration"])
    assert durations == [200, 200, 1000]


def test_the_name_of_the_file_decides(tmp_path):
    rows = [PanelRow("", [VideoPanel("x", levels(3))])]
    write_panels(tmp_path / "new" / "a.webp", rows, 5)
    write_panels(tmp_path / "a.png", rows, 5)
    assert Image.open(tmp_path / "new" / "a.webp").n_frames == 3
    assert Image.open(tmp_path / "a.png").format == "PNG"
    with pytest.raises(UserError, match=r"a.jpg: give a file name that ends in .png"):
        check_picture_name(tmp_path / "a.jpg")


def test_small_frames_are_enlarged_by_a_whole_factor():
    assert enlarge(levels(2), 128).shape == enlarge(levels(2), 128, smooth=True).shape == (2, 128, 192, 3)
    assert enlarge(levels(2, 200, 300), 128).shape == (2, 200, 300, 3)


def test_marked_frames_have_an_edge():
    marked = mark_frames(levels(3) + np.uint8(1), np.array([False, True, False]), (9, 9, 9))
    assert (marked[1, 0] == 9).all() and (marked[1, :, -1] == 9).all() and (marked[[0, 2]] != 9).all()
    assert (marked[1, 1:-1, 1:-1] == 21).all() and BACKGROUND == (255, 255, 255)
