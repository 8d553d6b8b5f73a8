"""The model card of an exported encoder: data, recipe, figures, limitations, and code that runs."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import vidssl
from vidssl.core.errors import UserError
from vidssl.evaluation.comparison import setting_of
from vidssl.evaluation.controls import control_name
from vidssl.evaluation.report import encoder_facts, is_same_encoder
from vidssl.pretrained.infer_config import Checkpoint

SNIPPET = """\
import numpy as np
import torch
from transformers import {model_class}, {processor_class}

folder = "."  # this folder, or its name on the hub
processor = {processor_class}.from_pretrained(folder)
model = {model_class}.from_pretrained(folder).eval()

# {frames_about}
frames = np.random.default_rng(0).integers(0, 256, {shape}, np.uint8)
# The centre square, cut before the processor scales it, as in the evaluation below
height, width = frames.shape[-3:-1]
side = min(height, width)
top, left = (height - side) // 2, (width - side) // 2
square = frames[..., top : top + side, left : left + side, :]
with torch.no_grad():
    outputs = model(**processor(square, return_tensors="pt"){options})
{result}
"""
# Model type: its tag on the hub
FAMILIES = {"videomae": "videomae", "vjepa2": "v-jepa-2", "ijepa": "i-jepa"}
# Control: (what was done to the clips, what a difference shows)
CONTROL_MEANINGS = {
    "shuffled": ("with the frames of each clip shuffled", "the features use the order of frames"),
    "reversed": ("with the frames of each clip reversed", "the features tell the direction of time"),
    "still": ("with one frame of each clip repeated", "the features use more than one frame"),
    "single": ("from the middle frame alone", "the features use more than one frame"),
    "random_init": ("with untrained weights", "training has helped"),
    "pixels": ("with mean colours of patches as features", "the encoder adds to colours"),
}
# Sections of a run's configuration, and which of their keys say how it was trained (None: all)
RECIPE: dict[str, tuple[str, ...] | None] = {
    "method": None,
    "model": None,
    "tune": None,
    "augment": None,
    "optim": None,
    "data": ("frames", "stride", "fps", "rule", "repeat", "windows", "short_side"),
    "run": ("steps", "batch", "seed"),
    "efficiency": ("precision",),
}


class CardFacts(NamedTuple):
    """What a card is made of."""

    name: str
    hf_config: dict[str, Any]  # config.json of the folder
    checkpoint: Checkpoint
    metadata: dict[str, Any]  # header of the encoder's file
    probes: list[dict[str, Any]]  # contents of probe.json files
    license: str | None = None
    datasets: Sequence[str] = ()  # names on the hub


def read_probes(source: Path, given: Sequence[Path], checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Contents of the probe.json files that evaluate this encoder: those given, or else those found in the
    run's folder `source`.

    Raises UserError for a given file that is none, or is of another encoder.
    """
    metadata = {"model": checkpoint.model, "pixels": checkpoint.pixels}
    facts = encoder_facts(checkpoint.build_encoder(), metadata)
    if not given:
        found = sorted(source.rglob("probe.json")) if source.is_dir() else []
        reports = [_read_probe_file(path) for path in found]
        return [report for report in reports if is_same_encoder(report["encoder"], facts)]
    reports = []
    for path in given:
        file = path / "probe.json" if path.is_dir() else path
        report = _read_probe_file(file)
        if not is_same_encoder(report["encoder"], facts):
            raise UserError(
                f"--probe {file}: evaluates another encoder, {report['encoder']['path']}; give a probe of "
                f"{source}"
            )
        reports.append(report)
    return reports


def _read_probe_file(path: Path) -> dict[str, Any]:
    """Raises UserError if it is no probe.json."""
    try:
        report = json.loads(path.read_text())
        if "sha256" in report["encoder"] and isinstance(report["results"], list):
            return report
    except FileNotFoundError:
        raise UserError(f"--probe {path}: no such file; give a probe.json, or its folder") from None
    except (ValueError, KeyError, TypeError, OSError):
        pass
    raise UserError(f"--probe {path}: is no report of vidssl probe")


def make_card(facts: CardFacts) -> str:
    """The text of README.md."""
    sections = (
        [_front_matter(facts), f"# {facts.name}", *_introduction(facts)],
        ["## Use", f"```python\n{snippet(facts.hf_config).rstrip()}\n```"],
        ["## Data", *_data_section(facts)],
        ["## Recipe", *_recipe_section(facts)],
        ["## Results", *_results_section(facts)],
        ["## Limitations", "\n".join(f"- {line}" for line in _limitations(facts))],
    )
    return "\n\n".join(part for section in sections for part in section) + "\n"


def _front_matter(facts: CardFacts) -> str:
    """The YAML block that the hub reads."""
    kind = facts.hf_config["model_type"]
    is_classifier = facts.hf_config["architectures"][0].endswith("Classification")
    if is_classifier:
        task = "video-classification"
    else:
        task = "image-feature-extraction" if kind == "ijepa" else "feature-extraction"
    tags = ["self-supervised-learning", "image" if kind == "ijepa" else "video", FAMILIES[kind], "vidssl"]
    fields = {"library_name": "transformers", "pipeline_tag": task, "tags": tags}
    licence = {"license": facts.license} if facts.license else {"license": "other", "license_name": "not-set"}
    # comments of YAML, which the hub does not show
    lines = ["---", yaml.safe_dump(licence, sort_keys=False).strip()]
    if not facts.license:
        lines.append("# set the licence before the folder is given away: vidssl convert --license apache-2.0")
    lines.append(yaml.safe_dump(fields, sort_keys=False).strip())
    lines.append(yaml.safe_dump({"datasets": list(facts.datasets)}, sort_keys=False).strip())
    if not facts.datasets:
        lines.append("# names of the training data on the hub: vidssl convert --dataset NAME")
    return "\n".join([*lines, "---"])


def _introduction(facts: CardFacts) -> Iterator[str]:
    model = facts.checkpoint.model
    data = facts.metadata.get("config", {}).get("data", {})
    pace = f", every {data['stride']} frames" if data.get("stride") else ""
    pace = f", {data['fps']} frames a second" if data.get("fps") else pace
    size = sum(weight.numel() for weight in facts.checkpoint.encoder.values())
    yield (
        f"A vision transformer of {size / 1e6:.3g} M parameters ({model['depth']} layers of width "
        f"{model['dim']}) for {input_words(model)}{pace}, exported by vidssl {vidssl.__version__} as "
        f"`{facts.hf_config['architectures'][0]}`."
    )
    if not facts.license:
        yield "**The licence is not set yet.**"
    if facts.hf_config["architectures"][0].endswith("ForPreTraining"):
        yield "`AutoModel` is the encoder alone, and lists the decoder's weights as unexpected."
    if facts.hf_config["model_type"] == "ijepa" and facts.checkpoint.predictor is not None:
        yield "The predictor is not part of this folder: transformers' I-JEPA has none."


def input_words(model: dict[str, Any]) -> str:
    """A native clip in words. model: arguments of the encoder."""
    size = f"{model['height']} x {model['width']} px"
    return f"images of {size}" if model["frames"] == 1 else f"clips of {model['frames']} frames of {size}"


def snippet(hf_config: dict[str, Any]) -> str:
    """Python code that runs in the folder; it ends with `features`, or with `logits` of a classifier."""
    kind = hf_config["model_type"]
    is_image = kind == "ijepa"
    count = hf_config.get("num_frames") or hf_config.get("frames_per_clip")
    is_classifier = hf_config["architectures"][0].endswith("Classification")
    if is_classifier:
        result = "logits = outputs.logits  # [1, classes]"
    else:
        result = "tokens = outputs.last_hidden_state  # [1, tokens, width]\nfeatures = tokens.mean(1)"
    return SNIPPET.format(
        model_class="AutoModelForVideoClassification" if is_classifier else "AutoModel",
        processor_class="AutoImageProcessor" if is_image else "AutoVideoProcessor",
        frames_about="an RGB image u8 [height, width, 3]"
        if is_image
        else "RGB frames u8 [time, height, width, 3]",
        shape="(240, 320, 3)" if is_image else f"({count}, 240, 320, 3)",
        options=", skip_predictor=True" if kind == "vjepa2" and not is_classifier else "",
        result=result,
    )


def _data_section(facts: CardFacts) -> Iterator[str]:
    config = facts.metadata.get("config")
    if not config or "data" not in config:
        source = facts.metadata.get("source", facts.checkpoint.format)
        yield f"Converted from a checkpoint of {source}, which does not say on what it was trained."
        return
    folders = config["data"]["train"]
    names = ", ".join(f"`{short_path(f)}`" for f in ([folders] if isinstance(folders, str) else folders))
    text = f"Videos of {names}"
    if facts.metadata.get("data"):
        text += f" (SHA-256 of the index: `{facts.metadata['data']}`)"
    run = config.get("run", {})
    step = facts.metadata.get("step")
    if step and "batch" in run:
        text += f", {step:,} steps of {run['batch']:,} clips: {step * run['batch']:,} clips"
    yield f"{text}."


def short_path(folder: str) -> str:
    """The end of a path or address: what is above it says where a machine keeps its data."""
    return "/".join(Path(folder.partition("://")[2] or folder).parts[-2:])


def _recipe_section(facts: CardFacts) -> Iterator[str]:
    config = facts.metadata.get("config")
    if not config:
        yield "That of the published checkpoint; this folder has its weights under the names of transformers."
        return
    chosen = {
        section: config[section] if keys is None else {k: config[section].get(k) for k in keys}
        for section, keys in RECIPE.items()
        if section in config
    }
    recipe = without_empty(chosen)
    versions = ", ".join(
        f"{name} {facts.metadata[name]}" for name in ("vidssl", "revision") if facts.metadata.get(name)
    )
    started = config.get("run", {}).get("init")
    yield f"Trained with {versions or 'vidssl'}" + (f", from {short_path(started)}." if started else ".")
    yield f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False).strip()}\n```"


def without_empty(tree: Any) -> Any:
    """A configuration without the options that are left out: None, [], {}."""
    if not isinstance(tree, dict):
        return tree
    kept = {key: without_empty(value) for key, value in tree.items()}
    return {key: value for key, value in kept.items() if value not in (None, [], {})}


class ResultRow(NamedTuple):
    """A row of a probe, and short paths of its data."""

    row: dict[str, Any]
    train: str
    test: str
    setting: str  # its data by their hashes, and how it was probed

    @property
    def figure(self) -> str:
        """Value and 95 % interval."""
        low, high = self.row["ci95"]
        return f"{self.row['value']:.4g} [{low:.4g}, {high:.4g}]"

    @property
    def condition(self) -> tuple[str, str, str]:
        """What a control and its reference have in common."""
        return self.row["protocol"], self.row["label"], self.setting


def result_rows(probes: Sequence[dict[str, Any]]) -> list[ResultRow]:
    """All rows of some probe.json files."""
    rows = []
    for report in probes:
        train, test = (", ".join(map(short_path, report["config"]["data"][key])) for key in ("train", "test"))
        rows += [ResultRow(row, train, test, setting_of(report)) for row in report["results"]]
    return rows


def _results_section(facts: CardFacts) -> Iterator[str]:
    rows = result_rows(facts.probes)
    if not rows:
        yield "None: no probe of this encoder was given."
        return
    yield (
        "Heads on frozen features, chosen on a held-out part of train; test is read once. Values (percent; "
        "r2 as it is) with 95 % intervals by bootstrap over groups of test samples."
    )
    lines = ["| probe | labels | train | clips | metric | value | chance | test samples |", "|---" * 8 + "|"]
    for result in rows:
        row = result.row
        share = f"{row['train_fraction']:.3g}, list {row['list_seed']}" if "train_fraction" in row else "all"
        cells = [row["protocol"], row["label"], f"{result.train} ({share})", control_name(row["control"])]
        cells += [row["metric"], result.figure, f"{row['chance']:g}", f"{row['n_test']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    yield "\n".join(lines)
    yield "Test: " + ", ".join(dict.fromkeys(f"`{row.test}`" for row in rows)) + "."


def _limitations(facts: CardFacts) -> Iterator[str]:
    """What is not known of the encoder, and what the controls of its probes say."""
    yield f"Trained on {input_words(facts.checkpoint.model)}; other lengths and sizes are not measured here."
    rows = result_rows(facts.probes)
    if not rows:
        yield "No evaluation came with it: nothing is known of what its features are good for."
        return
    yield "The figures hold for the test data above, and say nothing of other videos."
    shared = sum(report.get("test_samples_of_train_groups") or 0 for report in facts.probes)
    if shared:
        yield f"{shared:,} test samples are of groups (a recording, a person) that train has, too."
    whole = [row for row in rows if "train_fraction" not in row.row]
    references = {r.condition: r for r in whole if r.row["control"] == "none"}
    controls = [r for r in whole if r.row["control"] != "none" and r.condition in references]
    has_several = len({result.test for result in rows}) > 1
    for control in controls:
        test = f" on {control.test}" if has_several else ""
        yield control_line(references[control.condition], control, test)
    if not any(r.row["control"] in ("shuffled", "still", "single", "reversed") for r in controls):
        yield "No control of time was run: whether its features use more than single frames is not known."
    if not any(r.row["control"] == "random_init" for r in controls):
        yield "No untrained encoder was probed beside it: how much of the figures is training is not known."


def control_line(reference: ResultRow, control: ResultRow, test: str = "") -> str:
    """What a control says, in a sentence. reference: the row of the same labels on unchanged clips; test: the
    data that both were tested on, where there are several."""
    changed, shows = CONTROL_MEANINGS[control.row["control"]]
    differs = control.row["ci95"][1] < reference.row["ci95"][0]
    verdict = f"here {shows}" if differs else f"this does not show that {shows}"
    protocol, label, _ = reference.condition
    return f"{label} ({protocol}){test}: {reference.figure}, {changed} {control.figure}: {verdict}."
