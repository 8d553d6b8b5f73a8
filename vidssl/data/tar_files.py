"""Files in tar archives that other tools wrote: concatenated, cut off, with links, and with files that
operating systems leave behind."""

import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import Any

BLOCK = 512  # bytes
# Names that operating systems and archivers add beside a user's files, or as folders around copies of them.
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
SYSTEM_FOLDER = re.compile(
    r"__.*__|PaxHeaders?(\..*)?|\.AppleDouble|\.Trashes|\.Spotlight-V100|\.fseventsd|"
    + "|".join(map(re.escape, SYSTEM_FOLDERS))
)
SYSTEM_FILE = re.compile(r"\._.*|\.DS_Store|(eh)?thumbs\.db|desktop\.ini|\.directory|Icon\r", re.IGNORECASE)


def is_system_file(name: str) -> bool:
    """Whether a path is that of a file that an operating system left there, such as ._x or Thumbs.db."""
    *folders, base = name.split("/")
    return bool(SYSTEM_FILE.fullmatch(base)) or any(map(SYSTEM_FOLDER.fullmatch, folders))


class TarFiles:
    """Iterates over the regular files of an open tar, in stored order, and over those of further archives
    that follow it in the same file.

    ignored: reason -> number of members that are no files of samples. has_end: whether the last archive ends
    with blocks of zeros; if not, it may be cut. Raises tarfile.TarError if the file is damaged.
    """

    def __init__(self, archive: tarfile.TarFile):
        self.archive = archive
        self.ignored: Counter[str] = Counter()
        self.has_end = False
        self._members = 0

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        # tarfile reads the first header as it opens the file.
        info = self.archive.next()
        if info is None:
            self.archive.offset = self._file.tell()
            self.has_end = self.archive.offset > 0
        while info is not None or (info := self._next_header()) is not None:
            self._members += 1
            # tarfile keeps every header otherwise
            self.archive.members = []  # type: ignore[attr-defined]
            if reason := self._reason_to_ignore(info):
                self.ignored[reason] += 1
            else:
                yield info
            info = None

    @property
    def _file(self) -> Any:
        return self.archive.fileobj

    def _next_header(self) -> tarfile.TarInfo | None:
        """Returns the next header, past blocks of zeros; None at the end of the file."""
        archive = self.archive
        file = self._file
        if file.tell() != archive.offset:
            file.seek(archive.offset - 1)
            if not file.read(1):
                raise tarfile.ReadError(f"unexpected end of data after {self._members} members")
        while True:
            try:
                info = archive.tarinfo.fromtarfile(archive)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                archive.offset += BLOCK
                self.has_end = True
                continue
            except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
                return None
            except tarfile.HeaderError as e:
                where = f"byte {archive.offset}, after {self._members} members"
                raise tarfile.ReadError(f"no header of a tar at {where} ({e})") from e
            self.has_end = False
            return info

    def _reason_to_ignore(self, info: tarfile.TarInfo) -> str:
        if info.isdir():
            return "folder"
        if is_system_file(info.name):
            return "file of an operating system"
        if info.issym() or info.islnk():
            return "link"
        if not info.isfile():
            return "device or pipe"
        if info.issparse():
            return "sparse file"
        if split_name(info.name) is None:
            return "name without a key or an extension"
        return ""


def split_name(name: str) -> tuple[str, str] | None:
    """Returns the key and the lower-case extension of a member.

    WebDataset cuts the file name at its first dot. None for a name without a dot, or that begins with one.
    """
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, dot, ext = base.partition(".")
    if not stem or not dot:
        return None
    return (f"{folder}/{stem}" if folder else stem), ext.lower()
