"""Writes the table of all methods in docs/methods.md from configs/method/*.yaml.

python tools/methods_table.py      after a method was added or its header changed
"""

import re
from pathlib import Path
from typing import Any

import yaml

from vidssl.commands.catalogue import header_of, papers_of
from vidssl.core.errors import run_cli

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/methods.md"
BEGIN = "<!-- methods: written by tools/methods_table.py -->"
END = "<!-- end of methods -->"
COLUMNS = (
    "method",
    "paper",
    "formula",
    "mask",
    "score",
    "corrupt",
    "target",
    "query",
    "predictor",
    "error",
    "aux, agreement or task",
    "published",
)
# Arguments that are shown beside a part's kind.
SHOWN = ("ratio", "scale", "neither", "rule", "color", "norm", "momentum", "weight")
# What a header's sentence says to the command line alone.
SETTINGS = re.compile(
    r"\s*\((?:model|run)[./][^()]*\)|,?\s*\b(?:data|model)/\w+\.yaml"
    r"|,?\s*\b(?:run|model)\.\w+=(?:<[^>]*>|\w+)"
)


def main(argv: list[str]) -> None:
    PAGE.write_text(replace_table(PAGE.read_text()))


def replace_table(page: str) -> str:
    """The page with the table as the files give it now."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def table() -> str:
    """A line for each file in configs/method."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for path in sorted((ROOT / "configs/method").glob("*.yaml")):
        lines.append(" | ".join(cells(path)))
    return "\n".join(f"| {line} |" for line in lines)


def cells(path: Path) -> list[str]:
    """The line of one method."""
    text = path.read_text()
    header = header_of(path)
    method: dict[str, Any] = yaml.safe_load(text)["method"]
    parts = {key: describe(value) for key, value in method.items() if isinstance(value, dict | list)}
    if views := method.get("agree"):
        parts["agree"] = describe_agreement(views)
        parts.setdefault("mask", describe(views["mask"]) if "mask" in views else "")
    others = [parts[key] for key in ("aux", "agree", "pretext") if key in parts]
    return [
        f"[{path.stem}](../configs/method/{path.name})",
        paper(header),
        formula(method),
        *(parts.get(key, "") for key in ("mask", "score", "corrupt", "target", "query")),
        *(parts.get(key, "") for key in ("predictor", "error")),
        "; ".join(others),
        published(header),
    ]


def describe(part: Any) -> str:
    """Kind and main arguments of a part, or of a list of parts."""
    if isinstance(part, list):
        return "; ".join(describe(entry) for entry in part)
    words = [str(part.get("kind", ""))]
    if "depth" in part and "width" in part:
        words.append(f"{part['depth']} x {part['width']}")
    for key in SHOWN:
        if key in part and not isinstance(part[key], dict):
            value = part[key]
            shown = " to ".join(dict.fromkeys(map(number, value if isinstance(value, list) else [value])))
            words.append(f"{key} {shown}")
    return ", ".join(words)


def describe_agreement(part: dict[str, Any]) -> str:
    """Views, their loss, the branch that they are compared with, and the auxiliary losses."""
    counts = " + ".join(str(group.get("count", 1)) for group in part.get("views", ()))
    words = [f"{counts} views", describe(part.get("agreement", {}))]
    words += [f"branch {part['branch']}"] if "branch" in part else []
    words += ["hidden patches"] if "patches" in part else []
    return "; ".join([", ".join(words), *map(describe, part.get("aux", ()))])


def number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def formula(method: dict[str, Any]) -> str:
    """Which of the three formulas of docs/architecture.md, or their sum."""
    keys = (("mask", "1"), ("agree", "2"), ("pretext", "3"))
    return " + ".join(digit for key, digit in keys if key in method)


def paper(header: str) -> str:
    """Links to the papers that the first sentence names."""
    numbers = papers_of(":".join(header.split(":")[:2]))
    return ", ".join(f"[{n}](https://arxiv.org/abs/{n})" for n in numbers)


def published(header: str) -> str:
    """The header's sentence about the published run, without settings."""
    found = re.search(r"\bPublished (.*?)\.(?=\s|$)", header)
    text = SETTINGS.sub("", found[1]) if found else ""
    text = (
        re.sub(r"\s+", " ", text).replace(" ,", ",").replace("( ", "(").replace(" :", ":").replace(":,", ":")
    )
    return text.removeprefix("for ").replace("|", "\\|")


if __name__ == "__main__":
    run_cli(main)
