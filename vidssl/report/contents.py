"""What a page shows, as plain data: runs with verdicts, curves, probes, configuration; data sets; a zoo."""

import shlex
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import vidssl
from vidssl.core.errors import UserError
from vidssl.evaluation.comparison import short_names
from vidssl.report.curves import PANELS, columns_by_panel, curves_of
from vidssl.report.evaluations import Evaluation, confusions, find_evaluations, table_rows
from vidssl.report.run_files import Row, RunFiles, flatten, number, read_json, read_run
from vidssl.report.verdicts import as_plain, collapse_spans, verdicts_of
from vidssl.report.zoo_results import read_zoo

Draw = Callable[[Sequence[RunFiles]], list[dict[str, Any]]]


def expand_folders(folders: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Returns (run folders, zoo folders): a zoo's runs are in its folder `runs`. Raises UserError for a
    folder that is neither."""
    runs: list[Path] = []
    zoos: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the run.out of a training, or the out of a zoo")
        of_zoo = sorted(path for path in folder.glob("runs/*") if is_run(path))
        if is_run(folder):
            runs.append(folder)
        elif of_zoo or (folder / "results.csv").is_file():
            zoos.append(folder)
            runs += of_zoo
        elif inside := sorted(path for path in folder.glob("*") if is_run(path)):
            # Such as a quickstart's folder
            runs += inside
        else:
            raise UserError(
                f"{folder}: neither a run (config.yaml, log.jsonl), nor a zoo (results.csv), nor shards "
                "(index.json)"
            )
    return list(dict.fromkeys(runs)), zoos


def is_run(folder: Path) -> bool:
    """Whether a folder is of a training: a probe's alone has neither of its files."""
    return (folder / "log.jsonl").is_file() or (folder / "config.yaml").is_file()


def make_contents(
    folders: Sequence[Path], command: Sequence[str], draw: Draw | None = None
) -> dict[str, Any]:
    """The whole page. command: that made it; draw: makes the pictures of the runs; None: there are none."""
    run_folders, zoos = expand_folders(folders)
    names = short_names([folder / "log.jsonl" for folder in run_folders]) if run_folders else []
    runs = [read_run(folder, name) for folder, name in zip(run_folders, names, strict=True)]
    evaluations = [find_evaluations(run.folder, run.missing) for run in runs]
    panels = merged_panels(runs)
    return {
        "title": ", ".join(folder.resolve().name for folder in folders[:4])
        + (" …" if len(folders) > 4 else ""),
        "made": datetime.now().isoformat(" ", "seconds"),
        "version": vidssl.__version__,
        "command": shlex.join(command),
        "panels": panels,
        "runs": [
            run_contents(run, own, untrained_of_same_model(run, runs, evaluations), len(runs))
            for run, own in zip(runs, evaluations, strict=True)
        ],
        "data": data_summaries(runs),
        "pictures": [] if draw is None else draw(runs),
        "zoos": [read_zoo(folder) for folder in zoos],
    }


def merged_panels(runs: list[RunFiles]) -> list[dict[str, Any]]:
    """The charts of all runs, with the columns that any of them has."""
    columns: dict[str, list[str]] = {}
    for run in runs:
        for title, names in columns_by_panel(run.rows).items():
            known = columns.setdefault(title, [])
            known += [name for name in names if name not in known]
    known_panels = {panel.title: panel for panel in PANELS}
    order = [*known_panels, "Others"]
    found = []
    for title in sorted(columns, key=order.index):
        panel = known_panels.get(title)
        about = {"unit": "value", "about": "Further columns of the log.", "log": False}
        if panel is not None:
            about = {"unit": panel.unit, "about": panel.about, "log": panel.log}
        of_features = all(name.startswith("feature_") for name in columns[title])
        found.append({"title": title, "columns": columns[title], "of_features": of_features, **about})
    return found


def untrained_of_same_model(
    run: RunFiles, runs: list[RunFiles], evaluations: list[list[Evaluation]]
) -> list[Evaluation]:
    """Evaluations of untrained encoders of other runs whose model is the same."""
    same = [
        own
        for other, own in zip(runs, evaluations, strict=True)
        if other is not run and run.section("model") and other.section("model") == run.section("model")
    ]
    return [evaluation for own in same for evaluation in own if evaluation.is_untrained]


def run_contents(
    run: RunFiles, evaluations: list[Evaluation], others: list[Evaluation], runs: int
) -> dict[str, Any]:
    """What the page shows of one run."""
    verdicts = as_plain(verdicts_of(run, evaluations, others))
    found = {
        "name": run.name,
        "path": str(run.folder),
        "verdicts": verdicts,
        "facts": facts_of(run),
        "batch": run.batch,
        "last": last_values(run),
        "curves": curves_of(run.rows, runs),
        "collapse": collapse_spans(run.rows)[0],
        "probes": table_rows([e for e in evaluations if not e.is_dense]),
        "dense": table_rows([e for e in evaluations if e.is_dense]),
        "confusions": confusions(evaluations, run.missing),
        "config": [[key, plain_text(value)] for key, value in flatten(run.config)],
        "versions": versions_of(run),
        "command": train_command(run),
    }
    if not evaluations and not run.is_fine_tuning:
        run.missing.append(
            "No probe of this run was found: vidssl probe configs/probe/attentive.yaml "
            + shlex.join(
                [f"encoder={run.folder}", "data.train=...", "data.test=...", f"out={run.folder / 'probe'}"]
            )
        )
    return {**found, "missing": list(dict.fromkeys(run.missing))}


def last_values(run: RunFiles) -> Row:
    """The last row of the log, as it is."""
    return {k: v for k, v in run.rows[-1].items() if number(v) is not None} if run.rows else {}


def facts_of(run: RunFiles) -> list[list[str]]:
    """What the run is, in a few words."""
    method, model, data = (run.section(name) for name in ("method", "model", "data"))
    size = run.section("augment").get("size")

    def kind(name: str) -> str:
        part = method.get(name)
        return str(part.get("kind", "")) if isinstance(part, dict) else ""

    parts = [f"{name} {kind(name)}" for name in ("mask", "target", "predictor", "error", "agree", "pretext")]
    facts = [
        ["method", ", ".join(text for text in parts if not text.endswith(" "))],
        ["model", ", ".join(f"{k} {model[k]}" for k in ("kind", "dim", "depth", "patch") if k in model)],
        ["clips", f"{data.get('frames')} frames, {size} px" if data.get("frames") else ""],
        ["fine-tuned", f"{run.config.get('encoder')}, all of its weights" if run.is_fine_tuning else ""],
        ["data", ", ".join(map(str, data.get("train") or []))],
        ["batch", "" if run.batch is None else f"{run.batch} clips"],
        ["seed", str(run.section("run").get("seed", ""))],
    ]
    return [[name, text] for name, text in facts if text]


def plain_text(value: Any) -> str:
    return "null" if value is None else str(value)


def versions_of(run: RunFiles) -> list[list[str]]:
    """Versions that the encoder's file names."""
    header = run.header
    libraries = header.get("libraries")
    named = [(key, header.get(key)) for key in ("vidssl", "revision", "step", "data")]
    if isinstance(libraries, dict):
        named += libraries.items()
    return [[key, str(value)] for key, value in named if value is not None]


def train_command(run: RunFiles) -> str:
    """The command that trains the same again: config.yaml is resolved, and itself a configuration."""
    if not run.config:
        return ""
    program = "finetune" if run.is_fine_tuning else "train"
    key = "out" if program == "finetune" else "run.out"
    return shlex.join(["vidssl", program, str(run.folder / "config.yaml"), f"{key}={run.folder}_again"])


def data_summaries(runs: list[RunFiles]) -> list[dict[str, Any]]:
    """report.json of the shards that the runs name, where it is found."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        named = run.section("data").get("train") or []
        for text in [named] if isinstance(named, str) else named:
            folder = resolve_data(run, str(text))
            summary = None if folder is None else read_json(folder / "report.json")
            if summary is not None and text not in found:
                found[str(text)] = {"name": str(text), "report": summary}
    return list(found.values())


def resolve_data(run: RunFiles, text: str) -> Path | None:
    """The folder of shards that a configuration names: from here, or from a folder above the run, where it
    was started."""
    if "://" in text:
        return None
    places = [Path(text), *(above / text for above in run.folder.absolute().parents)]
    return next((place for place in places if (place / "index.json").is_file()), None)
