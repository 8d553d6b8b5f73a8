"""Pictures of a run's page that need more than the run: attention of its probes, decoded predictions."""

import shlex
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch

from vidssl.core.errors import UserError
from vidssl.pictures.attention import (
    OpenedProbe,
    attention_video,
    open_probe,
    predicted_class,
    query_attention,
)
from vidssl.pictures.decode_run import CLIPS_FILE
from vidssl.pictures.decoded import decoder_verdict
from vidssl.pictures.features import token_features
from vidssl.pictures.strips import Group, item, strip
from vidssl.report.clips import ReportClip, open_data, read_clips, spread_of
from vidssl.report.evaluations import Evaluation, find_evaluations
from vidssl.report.run_files import RunFiles, read_json

CLIPS = 6  # of each label set
DECODED_ABOUT = (
    "What the frozen run predicts behind its mask, drawn by a decoder that sees nothing else: truth, what "
    "the encoder sees, samples, their mean and deviation, and the same decoder given nothing."
)


def add_attention(run: RunFiles, looks: Group) -> None:
    """Adds clips with the attention of the last attentive probe of this encoder, one for each label set."""
    kept = [one for one in find_evaluations(run.folder, []) if any("head" in row for row in one.results)]
    trained = [one for one in kept if not one.is_untrained]
    if not trained:
        return
    probe = trained[-1].path.parent
    _, test = open_data(run)
    for label in dict.fromkeys(row["label"] for row in trained[-1].results if "head" in row):
        try:
            opened = open_probe(probe, label, encoder_now(run.folder, trained[-1]))
        except UserError as e:
            looks["missing"].append(f"{run.name}: {e}")
            continue
        labelled = [s for s in test.list_samples() if (s.meta.get("labels") or {}).get(label, -1) != -1]
        shown = read_clips(opened.view, test, spread_of(labelled, CLIPS))
        if shown:
            looks["items"] += attention_items(run.name, opened, shown)


def encoder_now(run: Path, evaluation: Evaluation) -> str:
    """Where the encoder that a probe names is: the same file of the run's folder as it is now."""
    parts = PurePath(str(evaluation.report["config"]["encoder"])).parts
    own = run.resolve().name
    places = [i for i, part in enumerate(parts) if part == own]
    return str(run.joinpath(*parts[places[-1] + 1 :])) if places else str(run)


def attention_items(name: str, opened: OpenedProbe, shown: Sequence[ReportClip]) -> list[dict[str, Any]]:
    """Clips beside what the head attends to, with what it says."""
    features = token_features(opened.loaded, torch.stack([one.clip for one in shown]))
    weights = query_attention(opened.saved, features)
    items = []
    for i, one in enumerate(shown):
        said = predicted_class(opened.saved, features[i : i + 1])
        heat = attention_video(one.frames, weights[i])
        strips = [strip(f"true: {one.label}", one.frames), strip(f"says: {said}", heat)]
        items.append(item(f"{name}: {one.name}", f"probe of {opened.saved.label}", strips, 2))
    return items


def add_decoded(run: RunFiles, decoded: Group) -> None:
    """Adds what vidssl decode has rendered of this run, with its figures."""
    for path in sorted(run.folder.glob("*/decoded.json")):
        report = read_json(path)
        drawn = read_json(path.with_name(CLIPS_FILE))
        if report is None or drawn is None:
            command = shlex.join(["vidssl", "decode", str(run.folder), "--out", str(path.parent)])
            again = f"{command} writes it"
            decoded["missing"].append(f"{run.name}: {path.parent} has no {CLIPS_FILE}; {again}.")
            continue
        lines = decoder_verdict(report)
        text = f"Decoder of {report['decoder']['steps']:,} steps. {'; '.join(lines)}."
        decoded["items"] += [
            {**one, "title": f"{run.name}: {one['title']}", "about": text if i == 0 else "", "wide": True}
            for i, one in enumerate(drawn.get("items") or [])
        ]
