"""Shows runs, a zoo or shards as one page that needs nothing else.

vidssl report RUN [RUN ...] [-o report.html]      RUN: folders written by vidssl train or finetune, or a zoo's
vidssl report RUN --watch                         serves the page and updates it while the run writes
vidssl report SHARDS                              writes report.json and report.png into a folder of shards
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder, os_errors_as_user_errors
from vidssl.core.suggestions import counted


def report_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="vidssl report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="runs, a zoo, or shards")
    p.add_argument("-o", "--out", type=Path, default=Path("report.html"), help="default: report.html")
    p.add_argument("--no-pictures", action="store_true", help="no clips, which need the run's data and torch")
    p.add_argument("--watch", action="store_true", help="serve the page on this machine, and keep it new")
    p.add_argument("--port", type=int, default=8713, help="of --watch; default: 8713; 0: a free one")
    return p


def main(argv: list[str]) -> None:
    a = report_parser().parse_args(argv)
    if shards := [folder for folder in a.folders if is_data(folder)]:
        if len(shards) < len(a.folders):
            raise UserError(f"{shards[0]}: holds shards; give shards and runs to reports of their own")
        report_shards(shards)
        return
    if a.out.suffix not in (".html", ".htm"):
        raise UserError(f"-o {a.out}: give a file name that ends in .html")
    if not a.watch:
        check_writable(a.out.parent)
    from vidssl.report.contents import expand_folders, make_contents
    from vidssl.report.page import plotly_script
    from vidssl.report.watch import serve_page

    # What is missing is said before any work
    plotly_script()
    expand_folders(a.folders)
    draw = None
    if not a.no_pictures:
        # Imported late: it imports torch
        from vidssl.report.pictures import Pictures

        draw = Pictures()
    make = partial(make_contents, a.folders, ["vidssl", "report", *argv], draw)
    if a.watch:
        serve_page(a.folders, make, a.port)
    else:
        write_report(a.out, make())


def write_report(out: Path, contents: dict[str, Any]) -> None:
    """Writes the page and says what it holds."""
    from vidssl.report.page import MAX_BYTES, write_page

    make_folder(out.parent)
    with os_errors_as_user_errors(out):
        size = write_page(out, contents)
    large = f", over {MAX_BYTES / 1e6:.0f} MB: give fewer runs" if size > MAX_BYTES else ""
    print(f"{out}: {counted(len(contents['runs']), 'run')}, {size / 1e6:.1f} MB{large}")
    print_verdicts(contents["runs"])


def is_data(folder: Path) -> bool:
    """Whether a folder is of packed shards, or holds such folders only."""
    if (folder / "index.json").is_file():
        return True
    runs = ("log.jsonl", "config.yaml", "results.csv")
    has_run = any((folder / depth / name).is_file() for depth in (".",) for name in runs)
    has_run = has_run or any(any(folder.glob(f"{depth}/log.jsonl")) for depth in ("*", "*/*"))
    return not has_run and any(folder.glob("*/index.json"))


def report_shards(folders: Sequence[Path]) -> None:
    from data_prep import report

    for folder in folders:
        report.main([str(folder)])


def print_verdicts(runs: Sequence[dict]) -> None:
    """A line for each run: the first verdict, and those that are not good."""
    for run in runs:
        first, *rest = run["verdicts"]
        notes = [f"{v['question']} {v['answer']}" for v in rest if v["kind"] in ("bad", "warn")]
        print("; ".join([f"{run['name']}: {first['question']} {first['answer']}", *notes]))


if __name__ == "__main__":
    run_cli(main)
