"""The stages of an adaptation in order: corpus, checkpoint, proposal, runs, probes, table. Each leaves
files, and a stage whose files are there is not repeated."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from vidssl.adaptation.corpus import Folders
from vidssl.adaptation.plan import (
    OwnVideos,
    config_tree,
    find_folders,
    make_proposal,
    open_corpus,
    write_config,
    write_parts,
)
from vidssl.adaptation.programs import (
    TRIAL_STEPS,
    adapted_job,
    check_programs,
    measured_steps,
    pack_job,
    probe_folder,
    probe_jobs,
    probed_data,
    run_once,
    scratch_job,
    trial_job,
)
from vidssl.adaptation.proposal import MIN_STEPS, Proposal
from vidssl.adaptation.request import Request, check_data, check_request, keep_request
from vidssl.adaptation.start import Start, read_start, save_start
from vidssl.adaptation.table import compared_rows, held_out_lines, label_tables
from vidssl.config import load_config, merge
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, claim_folder
from vidssl.data.shards import Shards
from vidssl.training.schema import TrainConfig
from vidssl.zoo.jobs import Outcome, run_jobs

KEPT_FREE = 0.1  # of the time, for what is not measured
TITLES = {"own": "your videos", "control": "control set (what was forgotten)"}
NO_LABELS = (
    "Without labels only the held-out error can be compared. It says how well hidden parts of such videos "
    "are predicted, not how good the features are for a task: whether adapting helped cannot be said. A few "
    "labelled videos of each class (labels.csv, vidssl pack --help) are enough to see it."
)


def adapt(request: Request, dry_run: bool) -> bool:
    """Proposes, and unless `dry_run` adapts and compares. Returns whether everything is done."""
    began_s = time.monotonic()
    start = read_start(request.source, merge(list(request.facts))[0])
    print(start.line, flush=True)
    with claim_folder(request.folder, "adapt"):
        check_request(request)
        corpus = open_corpus(request, packed(request))
        hashes = data_hashes(request, corpus.folders)
        check_data(request, hashes)
        print("\n".join(corpus.facts.lines()), flush=True)
        proposal = make_proposal(request, corpus, start)
        tree = config_tree(request, corpus, proposal)
        if not request.config_file.exists():
            print_proposal(request, corpus, proposal)
        check_programs(request, corpus, tree, start)
        if dry_run:
            return True
        keep_request(request, hashes)
        outcomes = prepare(request, corpus, start, tree, proposal, began_s)
        cfg = load_config([str(request.config_file)], TrainConfig)
        outcomes |= run_once(request, [adapted_job(request)])
        if corpus.labels:
            outcomes |= run_once(request, [scratch_job(request, cfg, start, request.config_file)])
        names = ["before", "untrained"]
        if outcomes["adapted"].status == "done":
            names.append("after")
        if "scratch" in outcomes and outcomes["scratch"].status == "done":
            names.append("from scratch")
        outcomes |= run_once(request, probe_jobs(request, corpus, cfg, names))
        print(f"\n{write_outcome(request, corpus, cfg, outcomes)}")
    return all(outcome.status == "done" for outcome in outcomes.values())


def packed(request: Request) -> Folders:
    """The packed folders of the videos, which are packed here if they are not yet. Raises UserError if they
    were packed from other files than there are now."""
    found = find_folders(request)
    if found and not Path(found.train).is_relative_to(request.folder):
        return found
    outcome = run_jobs([pack_job(request)], 1)["shards"]
    if outcome.status != "done":
        raise UserError(f"--videos {request.videos}: cannot be packed: {outcome.text}")
    found = find_folders(request)
    assert found is not None
    return found


def data_hashes(request: Request, folders: Folders) -> dict[str, str]:
    """Option that names data -> hash of its shards."""
    found = {"--videos": Shards([folders.train, *([folders.test] if folders.test else [])]).hash}
    if request.control:
        parts = [str(Path(request.control) / part) for part in ("train", "test")]
        found["--control"] = Shards(parts).hash
    return found


def print_proposal(request: Request, corpus: OwnVideos, proposal: Proposal) -> None:
    numbers = ", ".join(f"{int(part.sum())} {name}" for name, part in corpus.is_in.items())
    lines = [f"videos, by whole groups: {numbers}", *proposal.reasons]
    lines += [f"given: {setting}" for setting in request.settings]
    if not corpus.labels:
        lines.append("labels: none, so that only the held-out error is compared")
    print("\n".join(["proposal:", *(f"  {line}" for line in lines)]), flush=True)


def prepare(
    request: Request,
    corpus: OwnVideos,
    start: Start,
    tree: Mapping,
    proposal: Proposal,
    began_s: float,
) -> dict[str, Outcome]:
    """Writes the start, the parts of the videos and the configuration. With a limit of time a few steps and
    the probes of the checkpoint are measured first, and the run is as long as it can be."""
    if request.config_file.exists():
        return {}
    frames = int(tree["data"]["frames"])
    save_start(request.start, start, frames, request.source)
    write_parts(request, corpus)
    if request.minutes is None:
        write_config(request.config_file, dict(tree), proposal.reasons)
        return {}
    draft = request.folder / "trial.yaml"
    write_config(draft, dict(tree), proposal.reasons)
    cfg = load_config([str(draft)], TrainConfig)
    before = probe_jobs(request, corpus, cfg, ("before", "untrained"))
    outcomes = run_once(request, before)
    shutil.rmtree(request.run("trial"), ignore_errors=True)
    trial = run_jobs([trial_job(request, draft)], 1)["trial"]
    if trial.status != "done":
        raise UserError(f"the first steps fail: {trial.text}")
    steps = steps_in_time(request, corpus, cfg, outcomes, trial.seconds, began_s)
    if steps < cfg.run.steps:
        print(
            f"in {request.minutes:g} minutes a run can have {steps} of its {cfg.run.steps} steps", flush=True
        )
        proposal = make_proposal(request, corpus, start, steps)
        proposal.reasons.append(f"run.steps {steps}: what fits into --minutes {request.minutes:g}, measured")
        tree = config_tree(request, corpus, proposal)
        tree["run"]["steps"] = steps
    write_config(request.config_file, dict(tree), proposal.reasons)
    return outcomes


def steps_in_time(
    request: Request,
    corpus: OwnVideos,
    cfg: TrainConfig,
    outcomes: Mapping[str, Outcome],
    trial_s: float,
    began_s: float,
) -> int:
    """Raises UserError if the time is too short for a run."""
    assert request.minutes is not None
    runs = 2 if corpus.labels else 1
    # of the adapted encoder on each data set, and of the one from scratch on the user's
    probes = len(probed_data(request, corpus)) + bool(corpus.labels)
    slowest_s = max((outcome.seconds for outcome in outcomes.values()), default=0.0)
    left_s = (1 - KEPT_FREE) * 60 * request.minutes - (time.monotonic() - began_s) - probes * slowest_s
    steps = measured_steps(request, cfg.run.batch, trial_s, left_s, runs)
    if steps < MIN_STEPS:
        needed = request.minutes + (MIN_STEPS - steps) * runs * trial_s / TRIAL_STEPS / 60
        raise UserError(
            f"--minutes {request.minutes:g}: leave time for {max(0, steps)} steps; a run needs at least "
            f"{MIN_STEPS}: give {needed:.0f}"
        )
    return min(steps, cfg.run.steps)


def write_outcome(
    request: Request, corpus: OwnVideos, cfg: TrainConfig, outcomes: Mapping[str, Outcome]
) -> str:
    """Writes table.md and results.json. Returns the text of the table."""
    lines = [f"# {request.source} adapted to {request.videos}", ""]
    found = {}
    log = request.run("adapted") / "log.jsonl"
    held_out = held_out_lines(log, cfg.run.steps) if log.exists() else []
    lines += [*(f"{line}  " for line in held_out), ""]
    for data in probed_data(request, corpus):
        names = ("before", "after", "from scratch", "untrained")
        rows = compared_rows({name: probe_folder(request, data, name) for name in names})
        found[data] = [{key: value for key, value in row.items() if key != "hits"} for row in rows]
        lines += label_tables(TITLES[data], rows)
    if not corpus.labels:
        lines += [NO_LABELS, ""]
    failed = [f"- {name}: {o.status}: {o.text}" for name, o in outcomes.items() if o.status != "done"]
    lines += ["## Not done", "", *failed, ""] if failed else []
    best = request.run("adapted") / "encoder_best.safetensors"
    if best.exists():
        lines += [f"The adapted encoder: {best}", "(vidssl probe, finetune and embed read it.)", ""]
    text = "\n".join(lines)
    atomic_write_text(request.folder / "table.md", text)
    content = json.dumps(found, indent=1)
    atomic_write_text(request.folder / "results.json", content)
    return text
