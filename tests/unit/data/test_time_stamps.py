"""Times of frames: faulty time stamps are repaired where the fault is, and seconds are those of the file's
clock."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from data_prep.encode import encode_clips
from data_prep.filters import NO_FILTERS
from data_prep.recipe import Recipe
from vidssl.data.decoding.pyav import PyAVVideo
from vidssl.data.decoding.time_stamps import repair_times

N = 120
# Ten frames a second, then thirty.
TRUE = np.concatenate([np.arange(60) * 0.1, 6 + np.arange(60) / 30])
WRAP_S = 2**33 / 90_000  # the clock of MPEG-TS has 33 bits


def with_values(**values: float) -> np.ndarray:
    """The true stamps with others at some frames, as f50=4.9."""
    stamps = TRUE.copy()
    for frame, value in values.items():
        stamps[int(frame[1:])] = value
    return stamps


def with_run(first: int, end: int, value: float) -> np.ndarray:
    stamps = TRUE.copy()
    stamps[first:end] = value
    return stamps


FAULTS = {  # name: stamps, frames that may move, largest error of those in seconds
    "duplicate": (with_values(f50=4.9), [], 0),
    "duplicate of the next": (with_values(f50=TRUE[51]), [], 0),
    "duplicate in the fast part": (with_values(f80=TRUE[79]), [], 0),
    "swap": (with_values(f50=TRUE[51], f51=TRUE[50]), [], 0),
    "jump back of one frame": (with_values(f50=1.0), [], 0),
    "jump back to before the start": (with_values(f50=-3.0), [], 0),
    "far outlier": (with_values(f50=95_443.0), [], 0),
    "far outlier below": (with_values(f50=-95_443.0), [], 0),
    "near outlier": (with_values(f50=7.0), [], 0),
    "three outliers": (with_values(f20=90.0, f50=1.0, f100=7e4), [], 1e-3),
    "missing": (with_values(f50=np.nan, f51=np.nan), [], 0),
    "first missing": (with_values(f0=np.nan), [], 0),
    "last missing": (with_values(f119=np.nan), [], 0),
    "first too late": (with_values(f0=3.0), [], 0),
    "first far off": (with_values(f0=1e6), [], 0),
    "first far below": (with_values(f0=-1e6), [], 0),
    "last is zero": (with_values(f119=0.0), [], 0),
    "last far off": (with_values(f119=1e6), [], 0),
    "zeros": (with_run(40, 55, 0.0), [], 0),
    "zeros in the fast part": (with_run(90, 110, 0.0), [], 0),
    "zeros at the start": (with_run(0, 30, 0.0), [], 0),
    "zeros at the end": (with_run(100, 120, 0.0), [], 0),
    "steps back by half a second": (TRUE - 0.5 * (np.arange(N) >= 70), range(50, 120), 0.51),
    "in the order of decoding": (
        TRUE[[0, *(i + s for i in range(1, N - 3, 3) for s in (1, 2, 0)), *range(N - 2, N)]],
        [],
        0,
    ),
    "all swapped": (TRUE.reshape(-1, 2)[:, ::-1].ravel(), [], 0),
    "each stamp twice": (np.repeat(TRUE[::2], 2), range(120), 0.04),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_repaired_where_it_is(name):
    stamps, may_move, error = FAULTS[name]
    repaired = repair_times(stamps, 30.0)
    assert (np.diff(repaired.seconds) > 0).all()
    differences = np.abs(repaired.seconds - TRUE)
    moved = np.isin(np.arange(N), list(may_move))
    assert differences[~moved].max(initial=0) <= 1e-9 + (0 if may_move else error)
    assert differences.max() <= 1e-9 + error
    assert 0 < sum(repaired.repairs.values()) <= max(len(may_move), (stamps != TRUE).sum() + 3)


GOOD = [TRUE, TRUE - 5, TRUE + 95_440, np.arange(9) * 3600.0, np.zeros(1), np.zeros(0)]
GOOD += [np.array([0, 20, 20.1, 300])]


@pytest.mark.parametrize("stamps", GOOD)
def test_good_stamps_stay_bit_for_bit(stamps):
    repaired = repair_times(stamps, 30.0)
    assert np.array_equal(repaired.seconds, stamps) and not repaired.repairs


@pytest.mark.parametrize("jump", [-WRAP_S, -20.0, 5000.0, WRAP_S])
@pytest.mark.parametrize("frame", [30, 59, 100])
def test_a_clock_that_is_set_anew_goes_on(jump, frame):
    repaired = repair_times(TRUE + jump * (np.arange(N) >= frame), 30.0)
    steps = np.diff(repaired.seconds)
    # Only the step at which the clock is set is not known.
    assert np.allclose(np.delete(steps, frame - 1), np.delete(np.diff(TRUE), frame - 1))
    assert 0 < steps[frame - 1] <= 0.1 + 1e-9
    assert repaired.repairs == {"moved, for a clock that was set anew": N - frame}


@pytest.mark.parametrize(
    "stamps", [np.zeros(9), np.full(9, np.nan), np.arange(90.0)[::-1], np.arange(90) % 3.0]
)
def test_useless_stamps_give_way_to_the_rate(stamps):
    repaired = repair_times(stamps, 25.0)
    assert np.allclose(np.diff(repaired.seconds), 0.04)
    assert repaired.repairs == {"replaced by the average rate": len(stamps)}


def numbered(i: int) -> av.VideoFrame:
    """A frame of eight bars that spell its number."""
    bits = [235 if i >> b & 1 else 16 for b in range(8)]
    picture = np.repeat(np.array(bits, np.uint8), 8)[None, :, None].repeat(48, 0).repeat(3, 2)
    return av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format="yuv420p")


def number(frame: np.ndarray) -> int:
    bars = frame.mean((0, 2)).reshape(8, 8)[:, 2:6].mean(1)
    return sum(int(bar > 125) << b for b, bar in enumerate(bars))


def video_file(
    container: str,
    stamps_ms: list[int],
    sound_from_ms: int | None = None,
    codec: str = "libx264",
    **options: str,
) -> bytes:
    """A file of numbered frames with the given stamps, and silence from a time on, if that is given."""
    out = io.BytesIO()
    base = Fraction(1, 1000)
    with av.open(out, "w", format=container) as file:
        options = {"bf": "0", "g": "10", **options} if codec == "libx264" else options
        stream = file.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        if sound_from_ms is not None:
            sound = file.add_stream("aac" if container != "avi" else "mp2", rate=48_000)
            size = 1024 if container != "avi" else 1152
            form = "fltp" if container != "avi" else "s16"
            for k in range(0, 48 * (stamps_ms[-1] - sound_from_ms), size):
                silence = av.AudioFrame.from_ndarray(
                    np.zeros((1, size), np.float32 if form == "fltp" else np.int16), form, "mono"
                )
                silence.rate = 48_000
                silence.time_base = Fraction(1, 48_000)
                silence.pts = k + 48 * sound_from_ms
                file.mux(sound.encode(silence))
            file.mux(sound.encode())
        packets = []
        for i, stamp in enumerate(stamps_ms):
            frame = numbered(i)
            frame.pts, frame.time_base = (1000 * i, base) if options.get("bf") == "0" else (stamp, base)
            packets += stream.encode(frame)
        for i, packet in enumerate(packets + stream.encode()):
            if options.get("bf") == "0":
                packet.pts = packet.dts = stamps_ms[i]
            packet.stream, packet.time_base = stream, base
            file.mux(packet)
    return out.getvalue()


def segments(data: bytes, *spans: tuple[float, float]) -> list[list[int]]:
    clips = encode_clips(io.BytesIO(data), spans, Recipe(crf=4), NO_FILTERS, lambda: None)
    return [[number(f) for f in PyAVVideo(c.data).get(np.arange(c.meta["frames"]))] for c in clips]


@pytest.mark.parametrize("b_frames", ["0", "1", "2", "3"])
@pytest.mark.parametrize("container", ["avi", "mp4", "matroska", "mpegts"])
def test_b_frames_have_even_times(container, b_frames):
    with PyAVVideo(video_file(container, [100 * i for i in range(30)], bf=b_frames)) as video:
        assert np.allclose(video.times[:27], np.arange(27) / 10)
        assert [number(f) for f in video.get([3, 7, 20])] == [3, 7, 20]


def test_segments_of_a_file_with_a_duplicate_stamp():
    stamps = [100 * i for i in range(50)] + [5000 + 33 * i for i in range(50)]
    stamps[30] = stamps[29]
    data = video_file("matroska", stamps)
    first, second = segments(data, (2, 4), (5.5, 6))
    assert first == list(range(20, 40)) and second == list(range(66, 81))
    [clip] = encode_clips(io.BytesIO(data), [(2, 4)], Recipe(), NO_FILTERS, lambda: None)
    assert clip.meta["original"]["time_repairs"] == {"out of order": 2}
    with PyAVVideo(data) as video:
        assert video.time_repairs == {"out of order": 2} and not video.packets_match
        assert video.times[30] == pytest.approx(3.0)


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "mpegts", "flv"])
@pytest.mark.parametrize("sound, late", [(0, 1000), (1000, 0), (500, 500), (None, 1000)])
def test_seconds_are_those_of_the_file(container, sound, late):
    data = video_file(container, [late + 100 * i for i in range(50)], sound)
    # Without sound a file starts with its picture, except where an edit list says that nothing comes before.
    offset = late - min(late, late if sound is None else sound)
    edit_list = sound is None and container in ("mp4", "mov")
    with av.open(io.BytesIO(data)) as file:
        offset = late - round(file.start_time / 1000) if edit_list else offset
    first = 20 - offset // 100
    assert segments(data, (2, 2.5)) == [list(range(first, first + 5))]
