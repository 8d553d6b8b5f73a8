"""Folders of numbered images: the frames of a video each, or images of a class."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_prep.sources.common import FolderOptions
from data_prep.sources.names import VIEWS, are_frames, frame_number, is_frame_prefix, recording
from vidssl.core.errors import UserError
from vidssl.data.extensions import IMAGE_EXTENSIONS

SIZES_READ = 5  # images of a folder whose sizes are compared
FOLDERS_READ = 200  # folders whose images are compared


class Frames(NamedTuple):
    """Folders that are a video each, the paths of their frames, groups of images that stay images, and lines
    about them."""

    folders: list[str]
    paths: set[str]
    grouped: dict[str, str]  # path -> group
    notes: Sequence[str] = ()


def find_frames(root: Path, paths: list[str], options: FolderOptions) -> Frames:
    """Returns the folders of frames. Raises UserError if images can be read in two ways."""
    if options.frame_rate is not None:
        videos = frame_folders(paths, any_gaps=True)
        members = {path for names in videos.values() for path in names}
        others = numbered_folders(set(paths) - members)
        notes = [
            f"{len(others)} folders of numbered images are not one series each, such as {folder}: "
            "their images stay images"
            for folder in sorted(others)[:1]
        ]
        return Frames(sorted(videos), members, grouped_by_folder(others), notes)
    candidates = frame_folders(paths)
    if options.frames == "images":
        return Frames([], set(), grouped_by_folder(frames_beside_others(paths) | candidates))
    for folder, names in islice(candidates.items(), FOLDERS_READ):
        if have_one_size(root, names):
            raise UserError(
                f"{root}: are the {len(names)} numbered images of {folder} ({Path(names[0]).name}, ...) the "
                "frames of a video, or images? answer with --frame-rate RATE (frames a second; each such "
                "folder becomes one video) or --frames images"
            )
    return Frames([], set(), grouped_by_folder(frames_beside_others(paths)))


def grouped_by_folder(folders: Mapping[str, list[str]]) -> dict[str, str]:
    """Returns path -> group of the images in folders below others: the folder, or the recording that it is
    named after."""
    groups = {folder: recording(PurePosixPath(folder).name) or folder for folder in folders if "/" in folder}
    return {path: group for folder, group in groups.items() for path in folders[folder]}


def frames_beside_others(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns folder -> images, of folders of which two or more images are called frames, such as
    img_00001.jpg. They are of one recording, whatever else is there (a cover) or missing."""
    return {
        folder: names
        for folder, names in numbered_folders(paths).items()
        if sum(is_frame_prefix((frame_number(PurePosixPath(n).name) or ("", 0))[0]) for n in names) > 1
    }


def numbered_folders(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns folder -> paths of the images of folders in which two or more have a number."""
    return {
        folder: names
        for folder, names in by_folder(filter(is_image, paths)).items()
        if folder and sum(frame_number(PurePosixPath(name).name) is not None for name in names) > 1
    }


def frame_folders(paths: Iterable[str], any_gaps: bool = False) -> dict[str, list[str]]:
    """Returns folder -> the paths of its images, of folders that may hold the frames of a video and nothing
    else (see are_frames)."""
    return {
        folder: sorted(names, key=lambda path: (frame_number(PurePosixPath(path).name) or ("", 0))[1])
        for folder, names in sorted(by_folder(paths).items())
        if folder
        and all(is_image(path) for path in names)
        and are_frames((PurePosixPath(p).name for p in names), any_gaps)
    }


def by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    """Returns folder -> paths in it."""
    members: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        members[path.rpartition("/")[0]].append(path)
    return members


def is_image(path: str) -> bool:
    return PurePosixPath(path).suffix[1:].lower() in IMAGE_EXTENSIONS


def have_one_size(root: Path, paths: list[str]) -> bool:
    """Whether images, of which a few are opened, have the same size, as the frames of a video have."""
    from vidssl.data.decoding.image import ERRORS, open_image  # imports Pillow

    sizes = set()
    for path in paths[:: max(1, len(paths) // SIZES_READ)]:
        try:
            with open_image(root / path) as image:
                sizes.add(image.size)
        except ERRORS:
            continue
    return len(sizes) < 2


def numbered_recordings(paths: Iterable[str]) -> dict[str, str]:
    """Returns path -> group of the images whose names are those of a recording and a number.

    That is where a folder holds several series such as v_Run_g01_c01_0001.jpg, each of two or more images.
    Series such as left_0001.jpg and right_0001.jpg are views of one recording.
    """
    series: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in filter(is_image, paths):
        folder, _, name = path.rpartition("/")
        found = frame_number(name)
        if found and found[0].strip("-_ .") and not is_frame_prefix(found[0]):
            series[folder][found[0]].append(path)

    def group(folder: str, prefix: str, prefixes: Iterable[str]) -> str:
        if all(map(VIEWS.fullmatch, prefixes)):
            prefix = min(prefixes)
        return recording(prefix.rstrip("-_. ")) or (f"{folder}/{prefix}" if folder else prefix)

    return {
        path: group(folder, prefix, by_prefix)
        for folder, by_prefix in series.items()
        if len(by_prefix) > 1
        for prefix, names in by_prefix.items()
        if are_frames(PurePosixPath(path).name for path in names)
        for path in names
    }
