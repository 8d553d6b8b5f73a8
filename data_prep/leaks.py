"""Finds videos of an evaluation set in a training set: `vidssl leaks TRAIN TEST`.

Both are packed data sets. A test video is reported if TRAIN holds the same bytes (SHA-256 of the file) or the
same pictures, even re-encoded, scaled, at another frame rate or trimmed (data_prep/leak_search.py says how).

Not found: mirrored, rotated, strongly cropped or speed-changed copies, and those with less than 0.75 s in
common. Prints a line for each pair; exit status 1 if there is any.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from data_prep.index import write_lines
from data_prep.summary import Tally, left_out_lines
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable, make_folder
from vidssl.data.addresses import is_url
from vidssl.data.format import dumps, read_index


def not_compared_lines(records: list[dict]) -> Iterator[str]:
    """Yields a line for each reason for which videos are not compared, with their names."""
    tally = Tally()
    for record in records:
        if "error" in record:
            names = (f"{record[split]} of {split}" for split in ("test", "train") if split in record)
            tally.note(record["error"], " and ".join(names))
    yield from left_out_lines(tally.entries(), "not compared")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="vidssl leaks", description=__doc__.split("\n")[0])
    parser.add_argument("train", help="the packed training set, a folder or URL")
    parser.add_argument("test", help="the packed evaluation set, a folder or URL")
    parser.add_argument("--out", type=Path, help="where to write the pairs, one JSON object per line")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="decoding processes")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        help="seconds without progress until a video counts as hanging",
    )
    args = parser.parse_args(argv)
    if args.workers < 1 or args.timeout <= 0:
        raise UserError("--workers and --timeout must be positive")
    for folder in (args.train, args.test):
        if not is_url(folder):
            read_index(folder)
    if args.out:
        check_writable(args.out.parent)
    # Importing decoders takes a second: mistakes are answered before.
    from data_prep.leak_search import find_leaks
    from vidssl.data.shards import Shards

    train, test = Shards([args.train]), Shards([args.test])
    if args.out:
        make_folder(args.out.parent)
    records = list(find_leaks(train, test, args.workers, args.timeout))
    if args.out:
        write_lines(args.out, map(dumps, records))
    leaks = [record for record in records if "match" in record]
    for record in leaks:
        details = {name: value for name, value in record.items() if name not in ("test", "train")}
        print(f"{record['test']} matches {record['train']}: {dumps(details)}")
    leaked = len({record["test"] for record in leaks})
    print(
        f"{leaked} of {test.n} test videos are among the {train.n} of {args.train}; "
        f"{len(records) - len(leaks)} not decoded"
    )
    for line in not_compared_lines(records):
        print(line)
    if leaks:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
