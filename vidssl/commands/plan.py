"""Plans a pre-training run before it is started: parameters, FLOPs, memory, time, data, energy, failures.

    vidssl plan FILES.yaml ... [key=value ...] [--gpus 8xH100] [--hosts 4]

The files and keys are those of vidssl train; data.train and run.out may be missing. Nothing is computed or
written: FLOPs and memory are counted on tensors without values. All that was assumed is printed in one block;
docs/planning.md compares plans with measurements and with published runs. Exit status 0, whether the run fits
or not.
"""

import argparse
import json
from pathlib import Path

from vidssl.config import load_config, merge
from vidssl.core.cpus import available_cpus
from vidssl.core.errors import UserError, run_cli
from vidssl.data.schema import check_local_folders
from vidssl.planning.devices import CPU, DEVICES, Device, Sharding, parse_devices
from vidssl.training.schema import TrainConfig

SHARDINGS = ("ddp", "fsdp2", "zero1", "zero2")
GPU_MFU = 0.3
CPU_UTILIZATION = 0.35
CPU_MS = 47.7
INDEX = "index.json"
ABSENT = (("data", "train", "SHARDS"), ("run", "out", "RUN"))  # keys that a plan does not need


def positive(text: str) -> float:
    value = float(text)
    if not value > 0 or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def whole(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return value


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    p = argparse.ArgumentParser(
        prog="vidssl plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("config", nargs="*", metavar="FILE.yaml or key=value", help="as of vidssl train")
    known = ", ".join(name for name in DEVICES if name != CPU)
    p.add_argument(
        "--gpus",
        metavar="NxNAME",
        help=f"devices of a host: {known}; 4xCPU: cores; default: what this machine has",
    )
    p.add_argument("--hosts", type=whole, default=1, metavar="N", help="machines with so many devices each")
    p.add_argument(
        "--sharding",
        choices=SHARDINGS,
        default="ddp",
        help="the file of configs/accelerate, with several devices",
    )
    p.add_argument(
        "--mfu",
        type=positive,
        metavar="SHARE",
        help=f"of the peak rate that the model FLOPs reach; default: {GPU_MFU}, on a CPU {CPU_UTILIZATION}",
    )
    p.add_argument(
        "--cpu-ms",
        type=positive,
        default=CPU_MS,
        metavar="MS",
        help="CPU time of a clip; default: %(default)s",
    )
    p.add_argument(
        "--measure",
        type=whole,
        metavar="CLIPS",
        help="measure --cpu-ms here, on so many clips of data.train",
    )
    p.add_argument(
        "--videos", type=whole, metavar="N", help="videos of the corpus, where data.train is missing"
    )
    p.add_argument("--video-mb", type=positive, metavar="MB", help="mean size of one, 10**6 bytes")
    p.add_argument("--overhead", type=positive, default=1.5, help="power of all over that of the devices")
    p.add_argument(
        "--mtbf", type=positive, default=50_000, metavar="HOURS", help="between failures of one device"
    )
    p.add_argument("--restart-s", type=positive, default=300, help="seconds from a failure to the next step")
    p.add_argument(
        "--json", action="store_true", help="all figures as one JSON object, in bytes, seconds and FLOPs"
    )
    a, unknown = p.parse_known_intermixed_args(argv)
    return a, [*a.config, *unknown]


def planned_config(arguments: list[str]) -> TrainConfig:
    """The configuration of a run, which may lack its data and its folder."""
    tree, _ = merge(arguments)
    missing = [f"{s}.{k}={v}" for s, k, v in ABSENT if k not in (tree.get(s) or {})]
    return load_config([*arguments, *missing], TrainConfig)


def has_index(cfg: TrainConfig) -> bool:
    """Whether the index of the videos is here."""
    return cfg.data.reader == "indexed" and all(Path(path, INDEX).is_file() for path in cfg.data.train)


def devices_here() -> tuple[int, Device]:
    """The GPUs of this machine, or its cores."""
    import torch

    if not torch.cuda.is_available():
        return available_cpus(), DEVICES[CPU]
    name = torch.cuda.get_device_name()
    found = next((device for device in DEVICES.values() if device.name in name), None)
    if found is None:
        raise UserError(
            f"--gpus: no data sheet of this machine's {name} is known; known: {', '.join(DEVICES)}"
        )
    memory = torch.cuda.get_device_properties(0).total_memory
    return torch.cuda.device_count(), found._replace(memory_bytes=memory)


def main(argv: list[str]) -> None:
    a, arguments = parse(argv)
    devices = parse_devices(a.gpus) if a.gpus else None
    if a.mfu is not None and a.mfu > 1:
        raise UserError(f"--mfu {a.mfu:g}: it is a share: give at most 1")
    cfg = planned_config(arguments)
    if a.measure:
        check_local_folders("data.train", cfg.data.train)
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.planning.data_cost import PackedCorpus
    from vidssl.planning.report import report_lines
    from vidssl.planning.run_plan import Assumptions, Cluster, look_at_corpus, plan_run

    per_host, device = devices or devices_here()
    sharding: Sharding = a.sharding if per_host * a.hosts > 1 and not device.is_cpu else "none"
    corpus = PackedCorpus(a.videos, int(a.videos * (a.video_mb or 0) * 1e6)) if a.videos else None
    cpu_ms = a.cpu_ms
    if a.measure or has_index(cfg):
        corpus, measured_ms = look_at_corpus(cfg, a.measure or 0, not device.is_cpu)
        cpu_ms = measured_ms or cpu_ms
    assumed = Assumptions(
        mfu=a.mfu or (CPU_UTILIZATION if device.is_cpu else GPU_MFU),
        cpu_ms=cpu_ms,
        overhead=a.overhead,
        mtbf_hours=a.mtbf,
        restart_s=a.restart_s,
    )
    plan = plan_run(cfg, Cluster(device, per_host, a.hosts, sharding), assumed, corpus)
    print(json.dumps(plan.as_dict(), indent=1) if a.json else "\n".join(report_lines(plan)))


if __name__ == "__main__":
    run_cli(main)
