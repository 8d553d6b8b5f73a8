"""Shows runs, a zoo or shards as one page that needs nothing else.

vidssl report RUN [RUN ...] [-o report.html]      RUN: folders written by vidssl train or finetune, or a zoo's
vidssl report RUN --watch                         serves the page and updates it while the run writes
vidssl report SHARDS [SHARDS ...]                 packed data sets: clips, labels, damage, copies and leaks;
                                                  folders, or addresses such as https://... and s3://...
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder, os_errors_as_user_errors
from vidssl.core.suggestions import counted
from vidssl.data.addresses import canonical_address, is_url, without_query


def report_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vidssl report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folders", nargs="+", type=address, metavar="FOLDER", help="runs, a zoo, or shards")
    p.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="default: report.html")
    p.add_argument("--no-pictures", action="store_true", help="no clips, which need the run's data and torch")
    p.add_argument("--watch", action="store_true", help="serve the page on this machine, and keep it new")
    p.add_argument("--port", type=int, default=8713, help="of --watch; default: 8713; 0: a free one")
    add = p.add_argument_group("of shards").add_argument
    about = "compare some videos, all or none with each other, for near duplicates and leaks; default: some"
    add("--search", choices=("some", "all", "none"), default="some", help=about)
    add("--source", type=Path, metavar="FOLDER", help="the folder that was packed: rejected files are shown")
    return p


def main(argv: list[str]) -> None:
    a = report_parser().parse_args(argv)
    if a.out.suffix not in (".html", ".htm"):
        raise UserError(f"-o {a.out}: give a file name that ends in .html")
    shards = [folder for folder in a.folders if is_data(folder)]
    if shards and len(shards) < len(a.folders):
        raise UserError(
            f"{without_query(str(shards[0]))}: holds shards; give shards and runs to reports of their own"
        )
    if not shards and (a.source or a.search != "some"):
        raise UserError("--source and --search are for shards; a run has neither")
    if a.watch and shards:
        raise UserError("--watch: shards do not change; leave it out")
    if not a.watch:
        check_writable(a.out.parent)
    from vidssl.report.page import plotly_script

    # What is missing is said before any work
    plotly_script()
    command = ["vidssl", "report", *argv]
    if shards:
        report_data(a, command)
    else:
        report_runs(a, command)


def report_runs(a: argparse.Namespace, command: Sequence[str]) -> None:
    from vidssl.report.contents import expand_folders, make_contents
    from vidssl.report.watch import LiveContents, serve_page

    expand_folders(a.folders)
    draw = None
    if not a.no_pictures:
        # Imported late: it imports torch
        from vidssl.report.pictures import Pictures

        draw = Pictures()
    make = partial(make_contents, a.folders, command)
    if a.watch:
        serve_page(LiveContents(a.folders, make, draw), a.port)
        return
    contents = make(draw)
    write_report(a.out, contents, counted(len(contents["runs"]), "run"))
    print_verdicts(contents["runs"])


def report_data(a: argparse.Namespace, command: Sequence[str]) -> None:
    from vidssl.report.data_pictures import DataPictures
    from vidssl.report.data_sets import make_data_contents

    if a.source is not None and not a.source.is_dir():
        raise UserError(f"--source {a.source}: no such folder")
    draw = None if a.no_pictures else DataPictures(a.search, a.source)
    contents = make_data_contents(a.folders, command, draw)
    write_report(a.out, contents, counted(len(contents["sets"]), "data set"))
    for one in [*contents["sets"], {"name": "together", "verdicts": contents["between"]}]:
        notes = [f"{v['question']} {v['answer']}" for v in one["verdicts"] if v["kind"] in ("bad", "warn")]
        if one["verdicts"]:
            print(f"{one['name']}: {'; '.join(notes) or 'nothing to note'}")


def write_report(out: Path, contents: dict[str, Any], holds: str) -> None:
    """Writes the page and says what it holds."""
    from vidssl.report.page import MAX_BYTES, write_page

    make_folder(out.parent)
    with os_errors_as_user_errors(out):
        size = write_page(out, contents)
    large = f", over {MAX_BYTES / 1e6:.0f} MB: give fewer folders" if size > MAX_BYTES else ""
    print(f"{out}: {holds}, {size / 1e6:.1f} MB{large}")


def address(text: str) -> Path | str:
    """A folder, or the address of a remote one as it is."""
    text = canonical_address(text)
    return text if is_url(text) else Path(text)


def is_data(folder: Path | str) -> bool:
    """Whether a folder is of packed shards, or holds such folders only; remote ones always are."""
    if isinstance(folder, str):
        return True
    if (folder / "index.json").is_file():
        return True
    runs = ("log.jsonl", "config.yaml", "results.csv")
    has_run = any((folder / depth / name).is_file() for depth in (".",) for name in runs)
    has_run = has_run or any(any(folder.glob(f"{depth}/log.jsonl")) for depth in ("*", "*/*"))
    return not has_run and any(folder.glob("*/index.json"))


def print_verdicts(runs: Sequence[dict]) -> None:
    """A line for each run: the first verdict, and those that are not good."""
    for run in runs:
        first, *rest = run["verdicts"]
        notes = [f"{v['question']} {v['answer']}" for v in rest if v["kind"] in ("bad", "warn")]
        print("; ".join([f"{run['name']}: {first['question']} {first['answer']}", *notes]))


if __name__ == "__main__":
    run_cli(main)
