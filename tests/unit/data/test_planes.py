"""Clips of which the host only decodes (data.augment_on=device) are those of the host."""

import dataclasses
import io

import av
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from data_prep.scan import main as scan
from vidssl.data import device_augment
from vidssl.data.augment import CenterCrop, MovingCrop, MultiScaleCrop, RandomCrop, downscale
from vidssl.data.cache_fill import cache_videos
from vidssl.data.decoding import open_video
from vidssl.data.decoding.image import ImageVideo
from vidssl.data.decoding.planes import RGB
from vidssl.data.decoding.pyav import PyAVVideo
from vidssl.data.device_augment import PlaneBatch, collate_planes, make_clips
from vidssl.data.loader import make_streams, train_steps
from vidssl.data.planes import cut_clips, needed_span, place_augmentation
from vidssl.data.schema import ColorJitter, DataConfig, ExtraStream
from vidssl.data.shards import Shards

FRAMES = 6
MPEG, JPEG = 1, 2
BT709, BT601, BT2020, UNKNOWN = 1, 6, 9, 2


def movie(height: int, width: int) -> np.ndarray:
    """u8 [T, H, W, 3]: moving saturated colours with edges."""
    t, y, x = np.mgrid[0:FRAMES, 0:height, 0:width].astype(np.float32)
    waves = [np.sin(x / 9 + t), np.cos(y / 11 + x / 30), np.sin((x + y) / 15)]
    picture = 127 + 90 * np.stack(waves, -1) * np.sign(np.sin(x / 25) * np.sin(y / 21 + t))[..., None]
    return picture.clip(0, 255).astype(np.uint8)


def encode(frames: np.ndarray, format: str, space: int, range: int, codec: str = "ffv1") -> bytes:
    """A Matroska file that names its colours, lossless by FFV1."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = format
        stream.codec_context.colorspace = space
        stream.codec_context.color_range = range
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            levels = {"dst_colorspace": {BT709: 1, BT2020: 9}.get(space, 5), "dst_color_range": range}
            frame = frame.reformat(format=format, **levels)
            frame.colorspace, frame.color_range = space, range
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def clips_of(video, augment, indices, seeds, short_side=None):
    """The clips that host and device make of an open video, u8 [B, 3, T, S, S] each."""
    rngs = [np.random.default_rng(seed) for seed in seeds]
    size = downscale(np.empty((1, *video.size, 3), np.uint8), short_side).shape[1:3]
    draws = [augment.draw(*size, np.random.default_rng(seed)) for seed in seeds]
    host = [
        augment.apply(downscale(video.get(i), short_side), d) for i, d in zip(indices, draws, strict=True)
    ]
    planes = cut_clips(video, indices, augment, rngs, short_side)
    return torch.stack(host), planes


def difference(host: torch.Tensor, planes: list) -> float:
    """Grey levels on average, of the worst clip."""
    made = make_clips(collate_planes(planes))
    assert made.shape == host.shape and made.dtype == torch.uint8
    return float((made.float() - host.float()).abs().mean((1, 2, 3, 4)).max())


INDICES = [np.array([0, 2, 4]), np.array([5, 1, 1]), np.array([3, 4, 5])]
FILES = [
    ("yuv420p", BT709, MPEG, 64, 96),
    ("yuv420p", BT601, MPEG, 64, 97),
    ("yuv420p", UNKNOWN, MPEG, 63, 97),
    ("yuv420p", BT709, JPEG, 64, 96),
    ("yuv422p", BT709, MPEG, 64, 95),
    ("yuv422p", BT601, MPEG, 65, 96),
    ("yuv444p", BT601, JPEG, 64, 96),
    ("yuv444p", BT2020, MPEG, 65, 95),
    ("yuv420p10le", BT2020, MPEG, 64, 96),
    ("yuv422p10le", BT601, MPEG, 64, 96),
    ("yuv444p10le", BT709, JPEG, 61, 83),
    ("gray", UNKNOWN, JPEG, 64, 96),
    ("bgr0", UNKNOWN, JPEG, 64, 96),
]


@pytest.mark.parametrize("format, space, range, height, width", FILES)
def test_clips_of_planes_are_those_of_the_host(format, space, range, height, width):
    with PyAVVideo(encode(movie(height, width), format, space, range)) as video:
        is_planar = format == "yuv444p" or (format in ("yuv420p", "yuv422p") and height % 2 == 0)
        for augment in (RandomCrop(40, flip=0.5), RandomCrop(80, scale=(0.05, 0.4)), MultiScaleCrop(24)):
            host, planes = clips_of(video, augment, INDICES, [1, 2, 3])
            assert (planes[0].layout.format != RGB) == is_planar
            assert difference(host, planes) < (1.5 if is_planar else 0.5)
        assert difference(*clips_of(video, RandomCrop(30, flip=0.5), INDICES, [4, 5, 6], short_side=40)) < 1.5


def test_range_and_matrix_matter():
    """A wrong matrix or range is further away than the tolerance."""
    host = None
    for space, range in ((BT709, MPEG), (BT601, MPEG), (BT709, JPEG)):
        with PyAVVideo(encode(movie(64, 96), "yuv444p", space, range)) as video:
            made, planes = clips_of(video, CenterCrop(40), INDICES[:1], [0])
            host = made if host is None else host
            assert difference(host, planes) < 2  # the same pictures, whatever they were stored as
            wrong = planes[0].layout._replace(format=RGB._replace(chroma=(1, 1)))
            assert difference(made, [planes[0]._replace(layout=wrong)]) > 10


def test_h264_with_metadata_of_pack():
    data = encode(movie(64, 96), "yuv420p", BT709, MPEG, "libx264")
    meta = {"frames": FRAMES, "height": 64, "width": 96, "fps": 8.0, "decoder": "pyav"}
    with open_video(data, "mkv", meta) as video:
        host, planes = clips_of(video, RandomCrop(40, flip=0.5), INDICES, [1, 2, 3])
        assert difference(host, planes) < 1.5
        sizes = [len(p.pixels) / (3 * p.layout.size[0] * p.layout.size[1]) for p in planes]
        assert all(size == pytest.approx(1.5, abs=0.1) for size in sizes)  # bytes a pixel; RGB has 3


def test_files_of_unequal_formats_make_a_batch():
    host, planes = [], []
    for i, (format, space, range, height, width) in enumerate(FILES):
        with PyAVVideo(encode(movie(height, width), format, space, range)) as video:
            made = clips_of(video, RandomCrop(40, flip=0.5), INDICES[:1], [i])
            host.append(made[0])
            planes += made[1]
    assert difference(torch.cat(host), planes) < 1.5


def test_turned_frames_and_images_are_rgb():
    data = encode(movie(64, 96), "yuv420p", BT709, MPEG)
    with PyAVVideo(data) as video:
        video.size = 96, 64  # as of a file whose frames are not shown as they are stored
        planes = cut_clips(video, [np.array([0])], CenterCrop(40), [np.random.default_rng(0)], None)
        assert planes[0].layout.format == RGB
    picture = io.BytesIO()
    Image.fromarray(movie(50, 70)[0]).save(picture, "png")
    with ImageVideo(picture.getvalue()) as image:
        assert difference(*clips_of(image, RandomCrop(32, flip=0.5), [np.array([0, 0])], [3])) < 0.5


@pytest.mark.parametrize("full, scaled", [(256, 256), (256, 100), (97, 96), (31, 30)])
def test_needed_span_holds_the_pixels_that_have_weight(full, scaled):
    for start in range(0, scaled - 7, 3):
        first, count = needed_span(start, 7, full, scaled)
        assert first % 2 == 0 and (count % 2 == 0 or first + count == full)
        axis = device_augment.Axis(start, 7, 0, full, scaled, 0)
        weights = device_augment.axis_weights(torch.tensor([[*axis]]).float(), [axis], 5, full)[0]
        used = weights.any(0).nonzero()[:, 0]
        assert first <= used.min() and used.max() < first + count
        assert torch.allclose(weights.sum(1), torch.ones(5))


def test_planes_cross_a_worker_in_one_tensor():
    with PyAVVideo(encode(movie(64, 96), "yuv420p", BT709, MPEG)) as video:
        _, planes = clips_of(video, RandomCrop(40, flip=0.5), INDICES, [1, 2, 3])
    (batch,) = DataLoader(planes, 3, num_workers=1, collate_fn=collate_planes)
    want = collate_planes(planes)
    assert batch.data.equal(want.data) and batch.layouts == want.layouts
    assert make_clips(batch).equal(make_clips(want))


def test_place_of_augmentation(caplog):
    data = DataConfig(["x"], frames=2, stride=1)
    plain = RandomCrop(32)
    rand = RandomCrop(32, randaugment="rand-m7-n4")
    assert place_augmentation(data, plain, True).augment_on == "device"
    assert place_augmentation(data, plain, False).augment_on == "host"
    assert place_augmentation(data, rand, True).augment_on == "host"
    cached = dataclasses.replace(data, cache="host", augment_on="device")
    assert place_augmentation(cached, plain, True).augment_on == "host"


@pytest.mark.parametrize("workers, isolate", [(0, False), (1, True)])
def test_batches_are_those_of_the_host(synthetic_shards, workers, isolate):
    """Two clips of each video, one stream of clips and one of scaled images."""
    folder = str(synthetic_shards / "train")
    images = ExtraStream([folder], frames=1, clips=8, stride=1)
    data = DataConfig([folder], frames=4, stride=2, repeat=2, short_side=40, extra_streams=(images,))
    augment = RandomCrop(24, flip=0.5, color_jitter=ColorJitter(0.3, 0.3, 0.3, p=0.5))
    steps = {}
    for place in ("host", "device"):
        placed = dataclasses.replace(data, augment_on=place)
        streams = make_streams(placed, [Shards([folder])] * 2, augment, 0, 4, 10)
        steps[place] = list(train_steps(streams, 0, 2, data.clips(16), workers=workers, isolate=isolate))
    for host, device in zip(*steps.values(), strict=True):
        for a, b in zip(host, device, strict=True):
            assert a.key == b.key and a.position.equal(b.position) and a.label.equal(b.label)
            assert isinstance(b.video, PlaneBatch)
            made = b.video.to(torch.device("cpu"))
            assert (made.float() - a.video.float()).abs().mean() < 2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    """Tars of images of two sizes and videos, in turn."""
    folder = tmp_path_factory.mktemp("pictures")
    video = encode(movie(40, 64), "yuv420p", BT709, MPEG, "libx264")
    for shard in range(4):
        with webdataset.TarWriter(str(folder / f"{shard}.tar"), encoder=False) as tar:
            for i in range(4):
                picture = io.BytesIO()
                Image.fromarray(movie(50, 60 + 10 * shard)[i]).save(picture, "png")
                media = {"mkv": video} if i % 2 else {"png": picture.getvalue()}
                tar.write({"__key__": f"{shard}-{i}", "cls": b"0", **media})
    scan([str(folder)])
    return str(folder)


def test_clips_of_moving_images_and_of_videos_share_a_batch(pictures):
    data = DataConfig([pictures], frames=4, stride=1, short_side=40)
    made = {}
    for place, cache in (("host", "none"), ("device", "none"), ("device", "device")):
        placed = dataclasses.replace(data, augment_on=place, cache=cache)
        streams = make_streams(placed, [Shards([pictures])], MovingCrop(32, flip=0.5), 0, 4, 10)
        cache_videos(streams.clips, 0, False, True)
        ((batch,),) = train_steps(streams, 0, 1, [16])
        made[place, cache] = batch.video.to(torch.device("cpu"))
    host = made["host", "none"]
    assert host.shape == (16, 3, 4, 32, 32)
    assert not any(clip[:, 0].equal(clip[:, 1]) for clip in host)
    for other in list(made.values())[1:]:
        assert (other.float() - host.float()).abs().mean() < 2


def test_an_image_fills_a_tubelet_beside_videos(pictures, synthetic_shards):
    """As in OmniMAE: a stream of images, each repeated twice, beside one of clips."""
    images = ExtraStream([pictures], frames=2, clips=8, stride=1)
    folder = str(synthetic_shards / "train")
    data = DataConfig([folder], frames=4, stride=2, extra_streams=(images,))
    streams = make_streams(data, [Shards([folder]), Shards([pictures])], RandomCrop(24), 0, 4, 10)
    ((clips, repeated),) = train_steps(streams, 0, 1, data.clips(16))
    assert clips.video.shape == (8, 3, 4, 24, 24) and repeated.video.shape == (8, 3, 2, 24, 24)
    of_images = [clip for key, clip in zip(repeated.key, repeated.video, strict=True) if key[-1] in "02"]
    assert of_images and all(clip[:, 0].equal(clip[:, 1]) for clip in of_images)
