"""The `data` section of a probe, the labelled samples it names, and the view of a sample that it and the
encoder give."""

from typing import Any, NamedTuple

from vidssl.core.errors import UserError
from vidssl.core.suggestions import multiples_near
from vidssl.data.shards import Shards
from vidssl.data.timing import middle_rate
from vidssl.evaluation.controls import Control, FrameOrder
from vidssl.evaluation.evaluate import check_disjoint
from vidssl.evaluation.extractor import Split
from vidssl.evaluation.probe_config import ProbeData
from vidssl.evaluation.protocol import ProbeProtocol
from vidssl.evaluation.splits import label_sets, labelled
from vidssl.evaluation.tasks import Kind, Task, make_task
from vidssl.evaluation.views import View
from vidssl.pretrained.load import LoadedEncoder


class LabelSet(NamedTuple):
    """A task with the label of each train and test sample (None: it has none)."""

    task: Task
    labels: dict[str, list[Any]]  # of train and test


class ProbeSplits(NamedTuple):
    """Train and test with the label sets that both have."""

    splits: dict[str, Split]  # train and test
    label_sets: dict[str, LabelSet]
    shared_groups: int  # number of test samples whose group is also in train


def open_probe_splits(data: ProbeData) -> ProbeSplits:
    """Opens the shards, and makes a task of each label set."""
    folders = {"train": data.train, "test": data.test}
    shards = {name: Shards(paths, data.cache_dir, data.cache_gb) for name, paths in folders.items()}
    names = label_sets(shards["train"], shards["test"], data.labels)
    splits = {name: Split(part, labelled(part, names)) for name, part in shards.items()}
    train, test = (split.samples for split in splits.values())
    shared_groups = check_disjoint(train, test)
    sets = {}
    for name in names:
        kind: Kind = "number" if name in data.numbers else "tags" if name in data.tags else "class"
        classes = {part: shards[part].classes[name] for part in shards}
        task, train_labels, test_labels = make_task(
            name, classes["train"], train, test, kind, classes["test"]
        )
        sets[name] = LabelSet(task, {"train": train_labels, "test": test_labels})
    return ProbeSplits(splits, sets, shared_groups)


def make_view(data: ProbeData, protocol: ProbeProtocol, loaded: LoadedEncoder, control: Control) -> View:
    """The view of a probe under a control."""
    return encoder_view(
        loaded,
        protocol.segments,
        protocol.crops,
        frames=data.frames,
        size=data.size,
        stride=data.stride,
        fps=data.fps,
        control=control,
    )


def check_multiple(key: str, value: int, unit: int, part: str) -> None:
    """Raises UserError if the encoder's patches do not divide a clip."""
    if value % unit:
        near = multiples_near(value, unit)
        raise UserError(f"{key}: {value} is not a multiple of the encoder's {part} of {unit}; give {near}")


def encoder_view(
    loaded: LoadedEncoder,
    segments: int,
    crops: int,
    *,
    frames: int | None = None,
    size: int | None = None,
    stride: int | None = None,
    fps: float | None = None,
    control: Control = "none",
) -> View:
    """Clips with the frames, size (pixels) and rate (stride in frames, or fps) that the encoder was trained
    on, where these are None; of a range of rates the middle."""
    model = loaded.metadata["model"]
    if model["height"] != model["width"]:
        raise UserError(
            f"encoder: its clips are {model['height']} x {model['width']} px; a probe's are square"
        )
    frames = frames or model["frames"]
    size = size or model["height"]
    check_multiple("data.frames", frames, model["tubelet"], "tubelet")
    check_multiple("data.size", size, model["patch"], "patch")
    if stride is None and fps is None:
        trained = loaded.metadata.get("config")
        if frames == 1:
            stride = 1
        elif trained is None:
            raise UserError(
                "a public checkpoint does not state the distance of its frames: "
                "give stride or fps (data.stride or data.fps of a probe)"
            )
        else:
            stride, fps = middle_rate(trained["data"]["stride"], trained["data"]["fps"])
    order: FrameOrder = "none"
    first_frames = None
    if control == "single":  # by the model's own embedding of images, or repeated to fill one tubelet
        if model.get("fixed"):
            raise UserError(f"{model['name']} sees clips of {frames} frames only: use the control 'still'")
        order = "still"
        first_frames = 1 if model.get("image_tokenizer") else model["tubelet"]
    elif control != "random_init" and control != "pixels":
        order = control
    return View(frames, stride, fps, segments, crops, size, order, first_frames)
