"""What the programs of check_gpu.py share: their arguments, and how they end."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from check_gpu import SKIPPED


def skip(reason: str) -> NoReturn:
    """Ends the check as skipped."""
    print(reason)
    sys.exit(SKIPPED)


def run(check: Callable[[argparse.Namespace], tuple[bool, str, dict[str, Any]]], doc: str | None) -> None:
    """Calls the check with the parsed arguments and ends with its status.

    check: returns whether it passes, the line that says so, and figures for the report.
    """
    p = argparse.ArgumentParser(description=doc)
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    p.add_argument("--work", type=Path, help="folder for what the check makes")
    p.add_argument("--figures", type=Path, help="a file for the figures")
    a = p.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        skip("torch sees no GPU")
    passes, text, figures = check(a)
    if a.figures:
        a.figures.write_text(json.dumps(figures, indent=1))
    print(text)
    sys.exit(0 if passes else 1)
