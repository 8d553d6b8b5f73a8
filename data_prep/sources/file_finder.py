"""Finds the files that annotations name."""

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.common import list_files
from data_prep.sources.names import UNFINISHED, media_stem
from data_prep.summary import Tally, printable
from vidssl.core.suggestions import counted
from vidssl.data.extensions import VIDEO_EXTENSIONS
from vidssl.data.split_names import parse_split


class FileFinder:
    """Finds files by name, without folder and extension: annotations name them so, and folders differ by
    mirror."""

    def __init__(
        self, root: Path, extensions: Sequence[str] = VIDEO_EXTENSIONS, annotations: Sequence[Path] = ()
    ):
        """annotations: lists that are read; those below `root` are no files that are left out."""
        self.root = root
        self.paths: dict[str, list[str]] = {}  # name -> sorted paths
        self._ignored = Tally()
        self._used: set[str] = set()
        self._alternatives: dict[str, str] = {}  # path that was taken -> another one that fits as well
        self._notes: list[str] = []
        lists = {file.resolve() for file in annotations}
        list_names = {file.name for file in annotations}
        for path in sorted(list_files(root, self._ignored, self._notes)):
            name = path.rpartition("/")[2]
            ext = os.path.splitext(name)[1]
            if name in list_names and (root / path).resolve() in lists:
                continue
            if os.fsencode(path).decode("utf-8", "replace") != path:
                self._ignored.note("(not named in UTF-8)", path)
            elif UNFINISHED.search(name):
                self._ignored.note("(unfinished download)", path)
            elif name.startswith("."):
                self._ignored.note("(hidden)", path)
            elif ext[1:].lower() not in extensions:
                self._ignored.note(ext.lower() or "(no extension)", path)
            elif not os.path.isfile(root / path):
                self._ignored.note("(broken link)", path)
            else:
                self.paths.setdefault(_stem(name), []).append(path)

    def find(self, name: str, folder: str | None = None, split: str | None = None) -> str | None:
        """Returns the path of `name`, or None. Prefers one inside a folder called `folder`, then one inside a
        folder of `split`, then one in no folder of a split, then the first by path."""
        paths = self.paths.get(unicodedata.normalize("NFC", name), [])
        if not paths:
            return None
        if len(paths) > 1:
            paths = [path for path in paths if folder in path.split("/")[:-1]] or paths
            splits = {path: _split_of_folders(path) for path in paths}
            named = parse_split(split or "")
            wanted = named.split if named else split
            paths = (
                [path for path in paths if wanted is not None and splits[path] == wanted]
                or [path for path in paths if splits[path] is None]
                or paths
            )
            if len(paths) > 1:
                self._alternatives[paths[0]] = paths[1]
        self._used.add(paths[0])
        return paths[0]

    @property
    def notes(self) -> list[str]:
        """Lines about links, and about names of which there are several files."""
        if not self._alternatives:
            return self._notes
        taken = min(self._alternatives)
        note = (
            f"{counted(len(self._alternatives), 'name')} with several files: the first by path is taken, "
            f"such as {printable(taken)} and not {printable(self._alternatives[taken])}"
        )
        return [*self._notes, note]

    def ignored_files(self, not_found: str = "(not in the annotations)") -> Tally:
        """Counts the files of other kinds and those that were never found by name. not_found: why."""
        ignored = Tally()
        ignored.merge(self._ignored)
        for paths in self.paths.values():
            is_found = not self._used.isdisjoint(paths)
            for path in paths:
                if path not in self._used:
                    ignored.note("(another file of this name is taken)" if is_found else not_found, path)
        return ignored


def _stem(name: str) -> str:
    """Equal letters are equal characters (NFC), however a file system stores accents."""
    return unicodedata.normalize("NFC", media_stem(name))


def _split_of_folders(path: str) -> str | None:
    """The split that the folders of a path name, the innermost first."""
    found = (parse_split(folder) for folder in path.split("/")[-2::-1])
    return next((name.split for name in found if name), None)
