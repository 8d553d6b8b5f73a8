"""data/clip_length.py: how many videos are shorter than a clip, from the index alone."""

import pytest

from vidssl.data.clip_length import look_at, short_line
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards

LENGTHS = (5, 30, 61, 62, 100)  # frames, of 10 a second


@pytest.fixture
def shards(tmp_path, write_index):
    metas = [{"frames": n, "fps": 10.0, "duration": n / 10, "height": 4, "width": 4} for n in LENGTHS]
    return Shards([str(write_index(tmp_path / "a", "mp4", metas, {}))])


@pytest.mark.parametrize(
    "rate, line",
    [
        ({"stride": 1}, "data: 1 of 5 videos are shorter than a clip (data.stride 1 x 16 frames): "),
        ({"stride": 4}, "data: 2 of 5 videos are shorter"),  # a clip spans 61 frames
        ({"stride": 9}, "data: all 5 videos are shorter than a clip (data.stride 9 x 16 frames)"),
        ({"fps": 2}, "data: 4 of 5 videos are shorter than a clip (16 frames at 2 a second): it repeats"),
        ({"fps": 40}, ""),
    ],
)
def test_videos_shorter_than_a_clip_are_counted(shards, rate, line):
    clip = DataConfig(train=("x",), frames=16, **rate)
    assert short_line("data", clip, look_at(shards, clip)).startswith(line)
    if not line:
        assert short_line("data", clip, look_at(shards, clip)) == ""


def test_images_and_unmeasured_files_are_not_short(tmp_path, write_index):
    clip = DataConfig(train=("x",), frames=16, stride=4)
    for name, ext, meta in (("a", "jpg", {"frames": 1, "duration": 0.0}), ("b", "mp4", {})):
        corpus = look_at(Shards([str(write_index(tmp_path / name, ext, [meta] * 3, {}))]), clip)
        assert (corpus.samples, corpus.short, corpus.is_whole) == (3, 0, True)
        assert corpus.images == 3 * (ext == "jpg")


def test_of_a_large_data_set_a_part_is_looked_at(tmp_path, write_index):
    metas = [{"frames": 2, "fps": 1.0, "duration": 2.0, "height": 4, "width": 4}] * 1000
    clip = DataConfig(train=("x",), frames=16, stride=4)
    corpus = look_at(Shards([str(write_index(tmp_path / "a", "mp4", metas, {}))]), clip)
    assert (corpus.samples, corpus.short, corpus.is_whole) == (256, 256, False)
    assert "all 256 videos that were looked at" in short_line("data", clip, corpus)
