"""A folder of files: FOLDER/<class>/.../<file>, with folders of splits above or below the classes.

This is also the layout of torchvision's ImageFolder. If the folder has a labels.csv, that is read instead.
docs/data.md lists the layouts and what is understood of each.
"""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data_prep.sources.common import (
    EXTENSIONS,
    FolderOptions,
    SourceItem,
    SourceListing,
    list_files,
    rejection_reason,
)
from data_prep.sources.csv_list import read_csv_list
from data_prep.sources.frames import find_frames, numbered_recordings
from data_prep.sources.names import (
    UNFINISHED,
    are_splits,
    is_flow,
    is_thumbnail,
    media_stem,
    split_folder,
)
from data_prep.summary import Tally, printable
from vidssl.core.errors import UserError
from vidssl.data.extensions import IMAGE_EXTENSIONS
from vidssl.data.split_names import GENERIC, parse_split

ASK_SPLITS = "answer with --splits folders or --splits none"
THUMBNAIL_FOLDERS = ("thumbs", "thumbnails", "thumb", "previews", "covers", "posters")


def read_folder(
    root: Path, annotations: Sequence[Path], options: FolderOptions = FolderOptions()
) -> SourceListing:
    """The class of a file is the first folder level (below the split's folder)."""
    if annotations:
        raise UserError(f"--source folder reads no annotation file ({annotations[0]}); --source csv does")
    if (root / "labels.csv").is_file():
        return read_csv_list(root, [], options)
    ignored = Tally()
    rejected: dict[str, str] = {}
    notes: list[str] = []
    paths = find_media(root, ignored, rejected, notes)
    paths = leave_out_images(paths, options, ignored)
    frames = find_frames(root, paths, options)
    notes += frames.notes
    recordings = {} if options.frames == "images" and not frames.grouped else numbered_recordings(paths)
    if recordings:
        example = min(recordings.values())
        notes.append(f"{len(recordings)} numbered images are grouped by recording, such as {example}")
    files = sorted(set(paths) - frames.paths)
    items = [SourceItem(path, {}, recordings.get(path) or frames.grouped.get(path)) for path in files]
    items += [SourceItem(folder, {}, frame_rate=options.frame_rate) for folder in frames.folders]
    items = place(root, items, options, notes)
    label_sets = ["label"] if any(item.labels for item in items) else []
    items.sort(key=lambda item: item.sort_key)
    return SourceListing(items, label_sets, rejected, ignored, notes=notes)


def find_media(root: Path, ignored: Tally, rejected: dict[str, str], notes: list[str]) -> list[str]:
    """Returns the paths of the videos and images below `root`."""
    found = []
    for path in list_files(root, ignored, notes):
        name = path.rpartition("/")[2]
        ext = SourceItem(printable(path), {}).ext
        if UNFINISHED.search(name):
            ignored.note("(unfinished download)", path)
        elif name.startswith("."):
            ignored.note("(hidden)", path)
        elif ext not in EXTENSIONS:
            ignored.note("." + ext if ext else "(no extension)", path)
        elif os.fsencode(path).decode("utf-8", "replace") != path:
            # not UTF-8, so JSON cannot hold it
            rejected[os.fsencode(path).decode("utf-8", "backslashreplace")] = "bad_name"
        elif reason := rejection_reason(root, SourceItem(path, {})):
            rejected[path] = reason
        else:
            found.append(path)
    return found


def media_below(root: Path) -> tuple[list[str], Tally]:
    """Returns the videos and images below a folder that pack would take, sorted and with the folder, and
    counts the other files."""
    left_out = Tally()
    rejected: dict[str, str] = {}
    paths = find_media(root, left_out, rejected, [])
    paths = leave_out_images(paths, FolderOptions(), left_out)
    for path, reason in rejected.items():
        left_out.note(reason, path)
    return [str(root / path) for path in sorted(paths)], left_out


def leave_out_images(paths: list[str], options: FolderOptions, ignored: Tally) -> list[str]:
    """Returns the paths without optical flow and, unless they are kept, thumbnails of videos."""
    videos: dict[str, set[str]] = defaultdict(set)  # folder -> stems of its videos
    for path in paths:
        if PurePosixPath(path).suffix[1:].lower() not in IMAGE_EXTENSIONS:
            folder, _, name = path.rpartition("/")
            videos[folder].add(media_stem(name).lower())
    kept = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if folder.rpartition("/")[2].lower() in THUMBNAIL_FOLDERS:
            folder = folder.rpartition("/")[0]
        is_image = PurePosixPath(path).suffix[1:].lower() in IMAGE_EXTENSIONS
        if is_image and is_flow(path):
            ignored.note("(optical flow)", path)
        elif is_image and options.thumbnails == "leave-out" and is_thumbnail(name, videos.get(folder, set())):
            ignored.note("(thumbnail of a video; --thumbnails keep takes it)", path)
        else:
            kept.append(path)
    return kept


def place(root: Path, items: list[SourceItem], options: FolderOptions, notes: list[str]) -> list[SourceItem]:
    """Returns the items with the class and the split of their folders."""
    levels = {item.path: item.path.split("/")[:-1] for item in items}
    depth = split_depth(root, list(levels.values()), options, notes)
    placed = []
    for item in items:
        folders = levels[item.path]
        split = None
        if depth is not None:
            split = split_folder(folders[depth] if depth < len(folders) else "")
            folders = folders[:depth] + folders[depth + 1 :]
        # One folder around the splits: classes are below them
        is_wrapped = depth == 1 and len({path[0] for path in levels.values()}) == 1
        folders = folders[1:] if is_wrapped and len(folders) > 1 else folders
        # Never unlabelled: a folder may well be called "nan"
        labels = {"label": unicodedata.normalize("NFC", folders[0])} if folders else {}
        # The folder of a class is no recording
        group = None if len(folders) < 2 and item.group == item.path.rpartition("/")[0] else item.group
        placed.append(item._replace(labels=labels, split=split, group=group))
    if depth is None:
        notes += note_single_folder(list(levels.values()))
    return without_class_of_container(placed, notes)


def without_class_of_container(items: list[SourceItem], notes: list[str]) -> list[SourceItem]:
    """Returns the items without the class of a folder such as val/images, the only one of its split, if
    another split has two or more classes and not this one: it holds the files and is no class."""
    classes: dict[str | None, set[str]] = defaultdict(set)
    for item in items:
        classes[item.split] |= set(item.labels.values())
    containers = {
        split: min(names)
        for split, names in classes.items()
        if len(names) == 1
        and names <= GENERIC
        and any(len(others) > 1 and not others & names for others in classes.values())
    }
    notes += [
        f"{split}: its only folder, {name}, is taken for no class, since other splits have other classes"
        for split, name in sorted(containers.items(), key=str)
    ]
    return [item._replace(labels={}) if item.split in containers else item for item in items]


def note_single_folder(folders: list[list[str]]) -> list[str]:
    """Returns a line if all files are of one class, but in several folders of it. folders: those above each
    file."""
    tops = {tuple(levels[:1]) for levels in folders}
    seconds = {tuple(levels[1:2]) for levels in folders}
    if len(tops) != 1 or tops == {()} or () in seconds or len(seconds) < 2:
        return []
    return [
        f"all files are in {folders[0][0]}, the only class; pack that folder to take the {len(seconds)} "
        "folders in it for classes"
    ]


def split_depth(root: Path, folders: list[list[str]], options: FolderOptions, notes: list[str]) -> int | None:
    """Returns the level of the folders that are splits, 0 or 1; None: there are none.

    folders: those above each file. Raises UserError if both readings are possible.
    """
    tops = {levels[0] if levels else "" for levels in folders}
    seconds = [levels[1] if len(levels) > 1 else "" for levels in folders]
    below = are_splits(seconds) if seconds and all(seconds) else False
    if options.splits == "none" or not folders:
        return None
    if options.splits == "folders":
        return 1 if below and not any(map(parse_split, tops)) else 0
    above = are_splits(tops)
    named = ", ".join(sorted(name or "(no folder)" for name in tops)[:5])
    if above is None:
        raise UserError(f"{root}: are its folders ({named}) splits, or classes? {ASK_SPLITS}")
    if above:
        splits = sorted({f"{name} = {split_folder(name)}" for name in tops})
        notes.append(f"splits by folder: {', '.join(splits)}; --splits none takes them for classes")
        return 0
    if names := sorted(name for name in tops if parse_split(name)):
        notes.append(f"taken for a class beside {len(tops) - len(names)} others: {', '.join(names[:5])}")
    if below:
        notes.append(f"splits by folders below {named}: {', '.join(sorted(set(seconds))[:5])}")
        return 1
    check_no_partial_splits(root, folders)
    return None


def check_no_partial_splits(root: Path, folders: list[list[str]]) -> None:
    """Raises UserError if most classes have folders of two or more splits, but not only such folders."""
    found: dict[str, set[str]] = defaultdict(set)
    for levels in folders:
        name = parse_split(levels[1]) if len(levels) > 1 else None
        found[levels[0] if levels else ""] |= {name.split} if name and name.is_plain else set()
    divided = sorted(top for top, splits in found.items() if len(splits) > 1)
    if 2 * len(divided) > len(found):
        raise UserError(
            f"{root}: {divided[0]} holds folders of splits and other files or folders; move those, "
            f"or {ASK_SPLITS}"
        )
