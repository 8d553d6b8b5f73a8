"""What names of files and folders say: splits, numbered frames, thumbnails, unfinished downloads."""

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

from vidssl.data.extensions import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from vidssl.data.split_names import parse_split

FRAME_WORDS = ("img", "image", "frame", "frm", "f", "rgb", "im", "pic", "thumb")
MIN_DENSITY = 0.8  # part of the frames of a video that is there
MIN_NAMED_DENSITY = 0.5  # the same, where images are called frames (FRAME_WORDS)
UNFINISHED = re.compile(r"\.(part|ytdl|crdownload|download|temp|tmp|partial|aria2)(-frag\d+)?(\.|$)", re.I)
RECORDING = (  # of clips, and of their numbered frames
    r"(.+_g\d+)_c\d+(?:_\d+)?|([\w-]{11})_\d{6}_\d{6}(?:_\d+)?"
    r"|(.+)_[fhlu]_[cn]m_np\d_(?:ba|fr|le|ri)_(?:bad|med|goo)_\d+"
)
VIEWS = re.compile(r"(left|right|l|r|cam|camera|view)[-_. ]*\d*[-_. ]*", re.I)  # prefixes of frames
THUMBNAIL = re.compile(r"[-_. ](thumb|thumbnail|poster|cover|preview|fanart|\d{2,4}x\d{2,4})s?$", re.I)
THUMBNAILS = {"thumb", "thumbnail", "poster", "cover", "preview", "fanart", "folder"}
PART = re.compile(r"(clip|part|seg|segment|scene|shot)$", re.I)
FLOW = re.compile(r"flow[-_]?[xyuv]?[-_]?\d+", re.I)
FLOW_FOLDERS = {"flow", "flow_x", "flow_y", "flow_u", "flow_v", "optical_flow", "opticalflow", "tvl1_flow"}


def are_splits(names: Iterable[str]) -> bool | None:
    """Whether the folders of one level are splits rather than classes; None if both can be meant."""
    names = set(names)
    parsed = [found for name in names if (found := parse_split(name)) is not None]
    plain = {found.split for found in parsed if found.is_plain}
    if len(parsed) < len(names):
        others = len(names) - len(parsed)
        return False if not plain or (len(plain) == 1 and others >= 3) else None
    share_words = len({found.others for found in parsed}) == 1 and len({found.split for found in parsed}) > 1
    return True if all(found.is_plain for found in parsed) or share_words else None


def split_folder(name: str) -> str:
    """Returns the name of the data set of a split's folder, which may also be called extra."""
    found = parse_split(name)
    return found.split if found else re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40] or "other"


def media_stem(name: str) -> str:
    """Returns a file name without its media extensions: ID of ID.mp4.mkv."""
    extensions = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
    while "." in name[1:] and name.rpartition(".")[2].lower() in extensions:
        name = name.rpartition(".")[0]
    return name


def is_thumbnail(name: str, videos: set[str]) -> bool:
    """Whether an image belongs to one of `videos`, lower-case stems of the same folder, or to all of them."""
    stem = media_stem(name).lower()
    return stem in videos or THUMBNAIL.sub("", stem) in videos or (stem in THUMBNAILS and bool(videos))


def is_flow(path: str) -> bool:
    """Whether an image is a field of optical flow, by its name or its folder."""
    *folders, name = path.split("/")
    return bool(FLOW.fullmatch(media_stem(name))) or any(folder.lower() in FLOW_FOLDERS for folder in folders)


def frame_number(name: str) -> tuple[str, int] | None:
    """Returns (prefix, number) of a numbered file, such as img_00001.jpg or 7.png."""
    match = re.fullmatch(r"(.*?)(\d{1,12})", media_stem(name))
    return (match[1], int(match[2])) if match else None


def is_frame_prefix(prefix: str) -> bool:
    return prefix.strip("-_ .").lower() in FRAME_WORDS


def are_frames(names: Iterable[str], any_gaps: bool = False) -> bool:
    """Whether images of one folder may be the frames of a video: one prefix and a number each, of which most
    are there. Numbers in the names of other images are further apart. any_gaps: that many may be missing."""
    numbered = [frame_number(name) for name in names]
    if len(numbered) < 2 or None in numbered:
        return False
    prefixes = {found[0] for found in numbered if found}
    numbers = sorted(found[1] for found in numbered if found)
    step = min(b - a for a, b in pairwise(numbers))
    if len(prefixes) > 1 or step == 0:
        return False
    is_named = is_frame_prefix(prefixes.pop())
    min_density = MIN_NAMED_DENSITY if is_named else MIN_DENSITY
    is_dense = len(numbers) >= min_density * ((numbers[-1] - numbers[0]) / step + 1)
    return (is_dense or any_gaps) and (len(numbers) > 2 or is_named)


def numbered_series(paths: Iterable[str]) -> list[list[str]]:
    """Returns lists of paths that are named as numbered parts of one, such as A_clip1.mp4 and A_clip2.mp4,
    of folders that hold three or more of these."""
    folders: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        folder, _, name = path.rpartition("/")
        stem = media_stem(name)
        whole = PART.sub("", stem.rstrip("0123456789").rstrip("-_. ")).rstrip("-_. ")
        if stem[-1:].isdecimal() and any(map(str.isalpha, whole)):
            folders[folder][whole].append(path)
    several = ([p for p in series.values() if len(p) > 1] for series in folders.values())
    return [paths for found in several if len(found) > 2 for paths in found]


def recording(name: str) -> str | None:
    """Returns what the names of the clips of one recording share, as UCF101 (v_Run_g01_c02.avi), Kinetics
    (an ID of 11 characters, start and end: dQw4w9WgXcQ_000010_000020.mp4) and HMDB51
    (April_09_brush_hair_u_nm_np1_ba_goo_0.avi) name them; None of other names."""
    match = re.fullmatch(RECORDING, media_stem(name), re.IGNORECASE)
    return (match[1] or match[2] or match[3]) if match else None
