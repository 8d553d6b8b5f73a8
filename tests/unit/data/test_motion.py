"""data.motion_vectors: those of the codec, in clips that are cropped, scaled, flipped and turned."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_prep.inspect_file import inspect_file
from data_prep.scan import main as scan
from vidssl.core.errors import DecodeError, UserError
from vidssl.data.augment import RandomCrop, Window
from vidssl.data.decoding import open_video
from vidssl.data.decoding.motion_vectors import CELL, MotionField, turn_field
from vidssl.data.decoding.pyav import PyAVVideo
from vidssl.data.decoding.rotation import Rotation
from vidssl.data.loader import make_streams, open_shards, train_steps
from vidssl.data.motion import clip_motion
from vidssl.data.schema import DataConfig

HEIGHT, WIDTH, SIDE, FRAMES = 96, 160, 48, 18
MOVE = (4, 2)  # pixels a frame, right and down
KEY_FRAMES = 12  # frames from one I frame to the next
CORPUS = Path(__file__).parents[4] / "shared/corpus/videos"


def place(t: int) -> tuple[int, int]:
    """Row and column of the upper left corner of the square in frame t."""
    return 8 + MOVE[1] * t, 16 + MOVE[0] * t


def encode(codec: str = "libx264", container: str = "mp4", moving: bool = True) -> bytes:
    """A textured square that moves over a textured ground; each P frame refers to the frame before it."""
    rng = np.random.default_rng(0)
    ground = rng.integers(90, 140, (HEIGHT, WIDTH, 3), np.uint8)
    square = rng.integers(0, 255, (SIDE // 6, SIDE // 6, 3), np.uint8).repeat(6, 0).repeat(6, 1)
    options = {"libx264": {"bf": "0", "refs": "1", "g": str(KEY_FRAMES), "sc_threshold": "0", "crf": "10"}}
    file = io.BytesIO()
    with av.open(file, "w", format=container) as written:
        stream = written.add_stream(codec, rate=24, options=options.get(codec, {}))
        stream.height, stream.width = HEIGHT, WIDTH
        stream.pix_fmt = "yuv420p"
        for t in range(FRAMES):
            frame = ground.copy()
            y, x = place(t if moving else 0)
            frame[y : y + SIDE, x : x + SIDE] = square
            written.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        written.mux(stream.encode(None))
    return file.getvalue()


@pytest.fixture(scope="module")
def movie() -> bytes:
    return encode()


def read_field(data: bytes, indices: list[int], meta: dict | None = None) -> MotionField:
    with PyAVVideo(data, meta, motion_vectors=True) as video:
        video.get(indices)
        return video.motion(np.array(indices))


def inside(t: int) -> tuple[slice, slice]:
    """The cells that lie within the square of frame t."""
    y, x = place(t)
    return slice(-(-y // CELL), (y + SIDE) // CELL), slice(-(-x // CELL), (x + SIDE) // CELL)


def test_vectors_point_where_the_square_goes(movie):
    indices = [3, 1, 7, 3]
    field = read_field(movie, indices)
    assert field.vectors.shape == (4, 2, HEIGHT // CELL, WIDTH // CELL)
    assert field.vectors.dtype == np.float32 and field.origin == (0, 0)
    for vectors, t in zip(field.vectors, indices, strict=True):
        x, y = np.median(vectors[:, *inside(t)], (1, 2))
        assert (x, y) == pytest.approx(MOVE, abs=0.5)
        assert np.abs(vectors[:, :, -2:]).max() < 0.5  # the ground stays


def test_frames_without_vectors_have_those_before_them_else_those_after(movie):
    vectors = read_field(movie, [KEY_FRAMES - 1, KEY_FRAMES]).vectors
    assert (vectors[1] == vectors[0]).all() and vectors.any()
    vectors = read_field(movie, [0, 1]).vectors
    assert (vectors[1] == vectors[0]).all() and vectors.any()
    assert not read_field(movie, [0]).vectors.any()  # a single frame of a file: nothing moves


def test_a_sought_frame_has_its_vectors(movie):
    meta = list(inspect_file(movie, "mp4", "pyav"))[-1]
    whole = read_field(movie, list(range(FRAMES))).vectors
    for indices in ([1, 3], [4, 9], [KEY_FRAMES + 1, KEY_FRAMES + 4]):
        assert (read_field(movie, indices, meta).vectors == whole[indices]).all()


def test_codecs_that_hand_on_no_vectors_are_decode_errors():
    with pytest.raises(DecodeError, match="no_motion_vectors") as e:
        read_field(encode("libvpx-vp9", "webm"), [1, 4])
    assert e.value.reason == "no_motion_vectors"
    mpeg4 = read_field(encode("mpeg4", "avi"), [3, 4])
    assert np.median(mpeg4.vectors[1][:, *inside(4)], (1, 2)) == pytest.approx(MOVE, abs=1)
    assert not read_field(encode("mpeg4", "avi", moving=False), [3, 4]).vectors.any()


def test_images_do_not_move():
    picture = io.BytesIO()
    Image.new("RGB", (20, 30)).save(picture, "png")
    with open_video(picture.getvalue(), "png", None, "auto", True) as image:
        field = image.motion(np.array([0, 0]))
        motion = clip_motion(field, [Window(0, 0, 30, 20)], (30, 20), None, 32)
        assert motion.shape == (2, 2, 4, 4) and not motion.any()


@pytest.mark.parametrize("window", [Window(0, 16, 96, 96), Window(8.5, 24, 64, 80), Window(4, 10, 48, 40)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("short_side", [None, 48])
def test_motion_is_cropped_scaled_and_flipped_as_the_clip_is(window, flip, short_side):
    """A field whose values are smooth functions of the place, compared at the cells' centres."""
    y, x = np.mgrid[0:HEIGHT:CELL, 0:WIDTH:CELL] + (CELL - 1) / 2
    field = MotionField(np.stack([x, y])[None].astype(np.float32) + 0.5, (0.0, 0.0))
    scale = 1 if short_side is None else short_side / HEIGHT
    shown = Window(*(scale * edge for edge in window[:4]), flip)
    motion = clip_motion(field, [shown], (HEIGHT, WIDTH), short_side, 64).float()
    assert motion.shape == (2, 1, 8, 8)
    centres = (np.arange(8) + 0.5) / 8
    want_x = (window.left + window.width * centres) * 64 / window.width
    want_x = -want_x[::-1] if flip else want_x
    want_y = (window.top + window.height * centres) * 64 / window.height
    middle = slice(2, -2)  # the filter is cut at the edges
    assert np.allclose(motion[0, 0, middle, middle], np.tile(want_x, (8, 1))[middle, middle], atol=0.6)
    assert np.allclose(motion[1, 0, middle, middle], np.tile(want_y[:, None], 8)[middle, middle], atol=0.6)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows, columns", [(False, False), (True, False), (True, True)])
def test_fields_turn_with_their_frames(transpose, rows, columns):
    """A bright cell and the one that it moves to, turned, are still that far apart."""
    rotation = Rotation(transpose, rows, columns)
    field = np.zeros((2, 6, 9), np.float32)
    field[:, 2, 3] = 4, 1  # to the cell (3, 7)
    turned = turn_field(field, rotation)
    marks = np.zeros((6, 9, 2))
    marks[2, 3, 0] = marks[3, 7, 1] = 1
    marks = rotation.apply(marks)
    start, end = (np.argwhere(marks[..., i])[0] for i in (0, 1))
    assert turned[:, *start].tolist() == (end - start)[::-1].tolist()


def test_frames_cut_apart_have_motion_of_their_own():
    field = MotionField(np.ones((1, 2, 4, 4), np.float32), (0.0, 0.0))
    motion = clip_motion(field, [Window(0, 0, 32, 32), Window(0, 0, 16, 16, True)], (32, 32), None, 32)
    assert motion.shape == (2, 2, 4, 4)
    assert motion[:, 0].eq(1).all() and motion[0, 1].eq(-2).all() and motion[1, 1].eq(2).all()


# --- through the loader ---


@pytest.fixture(scope="module")
def tars(tmp_path_factory, movie) -> Path:
    folder = tmp_path_factory.mktemp("moving")
    still = encode(moving=False)
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"part-{shard}.tar"), encoder=False) as tar:
            for i in range(2):
                tar.write({"__key__": f"{shard}-{i}", "mp4": still if i else movie, "cls": b"0"})
    scan([str(folder)])
    return folder


def clip_data(folder: Path, **settings) -> DataConfig:
    return DataConfig(
        **{"train": [str(folder)], "frames": 4, "stride": 2, "motion_vectors": True, **settings}
    )


def batches(data: DataConfig, **options) -> list:
    shards, _ = open_shards(data)
    streams = make_streams(data, shards, RandomCrop(64, scale=(1.0, 1.0), flip=0.5), 0, 4, 10)
    return [batch for (batch,) in train_steps(streams, 0, 2, [8], **options)]


def test_batches_carry_the_motion_of_their_clips(tars):
    first, _ = plain = batches(clip_data(tars))
    assert first.motion.shape == (8, 2, 4, 8, 8) and first.motion.dtype == torch.float16
    speed = first.motion.float().norm(dim=1).amax((1, 2, 3))
    for key, most in zip(first.key, speed.tolist(), strict=True):
        assert (most > 2) == key.endswith("-0"), (key, most)
    without = batches(clip_data(tars, motion_vectors=False))
    for a, b in zip(plain, without, strict=True):
        assert a.video.equal(b.video) and a.key == b.key and b.motion is None
    for data, options in (
        (clip_data(tars), {"workers": 1, "isolate": True}),
        (clip_data(tars, augment_on="device"), {}),
    ):
        for a, b in zip(plain, batches(data, **options), strict=True):
            assert a.motion.equal(b.motion)
    repeated = batches(clip_data(tars, repeat=2))[0].motion
    assert repeated.shape == first.motion.shape and not repeated[0].equal(repeated[1])


def test_a_stream_carries_motion(tars):
    batch = batches(clip_data(tars, reader="stream"))[0]
    speed = batch.motion.float().norm(dim=1).amax((1, 2, 3))
    assert (speed > 2).tolist() == [key.endswith("-0") for key in batch.key]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decoder": "decord"}, "data.decoder decord: PyAV alone reads data.motion_vectors; give pyav"),
        ({"cache": "host"}, "data.cache host keeps no data.motion_vectors: give data.cache=none"),
    ],
)
def test_what_has_no_vectors_is_refused(settings, message):
    with pytest.raises(UserError) as e:
        clip_data(Path("x"), **settings)
    assert str(e.value) == message


@pytest.mark.skipif(not CORPUS.is_dir(), reason="no corpus of real videos")
def test_real_videos_have_vectors():
    files = sorted(CORPUS.rglob("*.mp4"))
    for file in files[:: max(1, len(files) // 6)]:
        motion = read_field(file.read_bytes(), [2, 4, 6, 8])
        assert motion.vectors.shape[:2] == (4, 2) and np.abs(motion.vectors).max() < 256
