"""The programs of an adaptation, each with a file that says that it is done, so that a call goes on where an
earlier one was cut off."""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from vidssl.adaptation.plan import OwnVideos
from vidssl.adaptation.proposal import EVALUATIONS, scratch_rate
from vidssl.adaptation.request import Request
from vidssl.adaptation.start import Start
from vidssl.config import load_config, save
from vidssl.config.yaml_text import list_argument
from vidssl.core.errors import UserError
from vidssl.core.io import atomic_write_text, read_json_rows
from vidssl.data.timing import middle_rate
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.training.schema import TrainConfig
from vidssl.zoo.jobs import PYTHON, Job, Outcome, run_jobs

TRIAL_STEPS = 8
WARM_STEPS = 2  # whose times are not counted
MAX_BINS = 4  # parts of a clip in time, of a linear probe


def job_of(request: Request, name: str, module: str, arguments: Sequence[str], result: Path | None) -> Job:
    folder = next((Path(a.partition("=")[2]) for a in arguments if a.startswith("out=")), request.run(name))
    log = request.folder / "logs" / f"{name.replace(' ', '-')}.txt"
    return Job(name, [*PYTHON, module, *arguments], folder, log, result)


def pack_job(request: Request) -> Job:
    """Packs the folder of videos; a second call finds it complete."""
    arguments = [request.videos, str(request.folder / "shards")]
    return job_of(request, "shards", "data_prep.pack", arguments, None)


def trial_job(request: Request, config: Path) -> Job:
    """A few steps, whose times are measured."""
    out = request.run("trial")
    steps = [f"run.steps={TRIAL_STEPS}", f"run.save_every={TRIAL_STEPS}", "optim.warmup=0", "run.log_every=1"]
    steps += [f"run.validate_every={TRIAL_STEPS}", f"online_probe.every={TRIAL_STEPS}"]
    arguments = [str(config), f"run.out={out}", *steps]
    return job_of(request, "trial", "vidssl.train", arguments, out / "encoder.safetensors")


def adapted_job(request: Request) -> Job:
    return job_of(request, "adapted", "vidssl.train", [str(request.config_file)], None)


def scratch_job(request: Request, cfg: TrainConfig, start: Start, config: Path) -> Job:
    """The same run from fresh weights, at the rate of a run from fresh weights. config: the file of cfg."""
    rate = scratch_rate(start.source.rate, start.source.batch, cfg.run.batch)
    keys = ["run.init=null", "run.patience=null", "run.stop_on_collapse=false", "run.validate_every=null"]
    keys += ["data.val=null", f"optim.lr={rate:.3g}", "optim.layer_lr_decay=1"]
    arguments = [str(config), f"run.out={request.run('scratch')}", *keys]
    return job_of(request, "scratch", "vidssl.train", arguments, None)


def encoders_of(request: Request) -> dict[str, list[str]]:
    """Name in the table -> arguments of a probe that name the encoder."""
    return {
        "before": [f"encoder={request.start}"],
        "untrained": [f"encoder={request.start}", "random_init=true"],
        "after": [f"encoder={request.run('adapted') / 'encoder_best.safetensors'}"],
        "from scratch": [f"encoder={request.run('scratch')}"],
    }


def probe_folder(request: Request, data: str, name: str) -> Path:
    return request.folder / "probes" / data / name.replace(" ", "_")


def probe_jobs(request: Request, corpus: OwnVideos, cfg: TrainConfig, names: Sequence[str]) -> list[Job]:
    """Probes of encoders on the user's labels, and on the control set."""
    jobs = []
    for data, folders in probed_data(request, corpus).items():
        for name in names:
            if data == "control" and name == "from scratch":
                continue
            out = probe_folder(request, data, name)
            arguments = [*probe_settings(request, cfg), *folders, *encoders_of(request)[name], f"out={out}"]
            title = f"probe {data} {name}"
            jobs.append(job_of(request, title, "vidssl.probe", arguments, out / "probe.json"))
    return jobs


def probed_data(request: Request, corpus: OwnVideos) -> dict[str, list[str]]:
    """own and control -> arguments of a probe that name the data."""
    found = {}
    if corpus.labels:
        found["own"] = [
            list_argument("data.train", [request.part("train"), request.part("val")]),
            list_argument("data.test", [corpus.test or request.part("test")]),
            list_argument("data.labels", corpus.labels),
        ]
    if request.control:
        folder = Path(request.control)
        found["control"] = [list_argument(f"data.{part}", [folder / part]) for part in ("train", "test")]
    return found


def probe_settings(request: Request, cfg: TrainConfig) -> list[str]:
    """Clips as they are trained on, for all encoders alike."""
    frames = cfg.data.frames
    size = cfg.augment.arguments["size"]
    stride, fps = middle_rate(cfg.data.stride, cfg.data.fps)
    rate = f"data.stride={stride}" if stride else f"data.fps={fps}"
    found = [f"configs/probe/{request.probe}.yaml", f"data.frames={frames}", f"data.size={size}", rate]
    if request.probe == "linear":
        slices = frames // int(cfg.model.arguments["tubelet"])
        bins = next(n for n in range(min(MAX_BINS, slices), 0, -1) if slices % n == 0)
        found.append(f"probe.temporal_bins={bins}")
    return [*found, "probe.controls=[none]"]


def check_programs(request: Request, corpus: OwnVideos, tree: Mapping, start: Start) -> None:
    """Raises UserError if a program after the first would refuse its configuration. tree: the configuration
    of the first."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapt.yaml"
        save(dict(tree), file)
        cfg = load_config([str(file)], TrainConfig)
        jobs = [scratch_job(request, cfg, start, file)] if corpus.labels else []
        jobs += probe_jobs(request, corpus, cfg, list(encoders_of(request)))
        for job in jobs:
            module, *arguments = job.command[len(PYTHON) :]
            cls: type = TrainConfig if module == "vidssl.train" else ProbeConfig
            try:
                load_config(arguments, cls)
            except UserError as e:
                raise UserError(f"{job.name}: {e}") from None


def run_once(request: Request, jobs: Sequence[Job]) -> dict[str, Outcome]:
    """Runs the jobs, one after the other, that no earlier call has ended. Each leaves a mark with
    its seconds."""
    outcomes = {}
    for job in jobs:
        mark = job.log.with_suffix(".done")
        if mark.exists():
            outcomes[job.name] = Outcome("done", float(mark.read_text()))
            continue
        outcomes |= run_jobs([job], 1)
        if outcomes[job.name].status == "done":
            seconds = str(outcomes[job.name].seconds)
            atomic_write_text(mark, seconds)
    return outcomes


def measured_steps(request: Request, batch: int, trial_s: float, left_s: float, runs: int) -> int:
    """Steps of each of `runs` runs that fit into `left_s` seconds. batch: clips a step; trial_s: seconds that
    the trial took."""
    rows = read_json_rows(request.run("trial") / "log.jsonl")
    step_s = statistics.median(batch / row["clips_per_s"] for row in rows[WARM_STEPS:])
    measuring_s = EVALUATIONS * rows[-1].get("diagnostics_s", 0.0)
    start_s = max(0.0, trial_s - len(rows) * step_s)
    return int((left_s - runs * start_s - measuring_s) / (runs * step_s))
