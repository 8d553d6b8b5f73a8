"""Lists what the project has: methods, models, masks, targets, predictors, data, probes, sources, recipes.

vidssl list                          what can be listed
vidssl list models '*small*'         names that match, with a line each and the papers (arXiv)
vidssl list masks --json
"""

import argparse
import difflib
import fnmatch
import json
import textwrap

from vidssl.commands.catalogue import CATALOGUES, Listed
from vidssl.core.errors import UserError, run_cli

WIDTH = 110
MAX_INDENT = 40


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="vidssl list", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", help=", ".join(CATALOGUES))
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="names to show, such as 'vjepa*'")
    parser.add_argument("--json", action="store_true", help="name, about and papers of each as JSON")
    args = parser.parse_args(argv)
    if args.what is None:
        counts = {name: len(list(catalogue.entries())) for name, catalogue in CATALOGUES.items()}
        print(json.dumps(counts) if args.json else "\n".join(f"{n:4d} {name}" for name, n in counts.items()))
        return
    found = matching(args.what, args.patterns)
    if args.json:
        print(json.dumps([entry._asdict() for entry in found], indent=1))
        return
    print("\n".join([*table_lines(found), "", f"use: {CATALOGUES[args.what].use}"]))


def matching(what: str, patterns: list[str]) -> list[Listed]:
    """The entries whose names match any of the patterns; all without patterns. Raises UserError with the
    nearest name if there is none."""
    if what not in CATALOGUES:
        near = difflib.get_close_matches(what, CATALOGUES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"lists: {', '.join(CATALOGUES)}"
        raise UserError(f"list {what}: no such list; {hint}")
    entries = list(CATALOGUES[what].entries())
    found = [e for e in entries if not patterns or any(fnmatch.fnmatch(e.name, p) for p in patterns)]
    if not found:
        names = [e.name for e in entries]
        near = difflib.get_close_matches(patterns[0].strip("*"), names, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"names: {', '.join(names)}"
        raise UserError(f"list {what} {' '.join(patterns)}: no name matches; {hint}")
    return found


def table_lines(entries: list[Listed]) -> list[str]:
    """Names and texts in two columns."""
    indent = min(MAX_INDENT, 2 + max(len(e.name) for e in entries))
    lines = []
    for e in entries:
        papers = f" [{', '.join(e.papers)}]" if e.papers else ""
        start = f"{e.name:{indent}}" if len(e.name) < indent else f"{e.name}  "
        lines += textwrap.wrap(f"{start}{e.about}{papers}", WIDTH, subsequent_indent=" " * indent)
    return lines


if __name__ == "__main__":
    run_cli(main)
