"""Several processes, whole models or shards (FSDP2): the same run, and the same files. And what starts them.

`python tests/test_scale.py PLAN.json` runs the plan's jobs in groups of processes that are forked, not
started, since the imports take longer than the jobs: {"shards": ..., "groups": [[world, [[name, [arguments],
...], ...]], ...]}.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from cpu_topologies import enable_cpu_sharding
from forked_world import fork_world, set_rank
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vidssl import train
from vidssl.config import load_config
from vidssl.core.errors import EXIT_REQUEUE, UserError
from vidssl.model.vit import Block
from vidssl.training import checkpoint, deepspeed
from vidssl.training.deepspeed import gradient_fragment
from vidssl.training.distributed import Strategy
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[2]
STEPS, SAVE = 6, 2
BOTH = [str(ROOT / f"configs/{name}.yaml") for name in ("model/vit_micro", "data/quickstart", "run/smoke")]
BOTH += ["model.dim=32", "method.predictor.width=16", "augment.size=16", f"run.steps={STEPS}"]
BOTH += [
    f"run.save_every={SAVE}",
    "run.feature_stats_every=3",
    "optim.warmup=2",
    "optim.eps=1e-5",
    "optim.clip_grad=0.3",
]
BOTH += ["data.cache=host", "efficiency.decode_in_subprocess=false", "efficiency.peer_timeout_s=600"]
METHODS = {
    "videomae": [
        str(ROOT / "configs/method/videomae_tiny.yaml"),
        "model.depth=1",
        "run.max_consecutive_skips=1",
    ],  # two of its steps are spoiled
    "vjepa": [str(ROOT / "configs/method/vjepa_tiny.yaml"), "model.depth=2", "optim.clip_per_module=true"],
}
# Predictors that METHODS do not have, for a run of one step each
PREDICTORS = {
    "cross": ["method.predictor={kind: cross, width: 16, depth: 1, heads: 2}"],
    "parallel": ["method.predictor={kind: parallel, copies: 2, width: 16, depth: 1, heads: 2}"],
    "conv": [
        "method.predictor={kind: conv, depth: 1, conv_groups: 4}",
        "method.query={kind: noise, std: 0.01}",
    ],
    "head": ["method.predictor={kind: head}", "method.corrupt={kind: token}", "method.query=null"],
}
LAUNCH = {name: ROOT / f"configs/accelerate/{name}.yaml" for name in ("ddp", "fsdp2", "zero1", "zero2")}


def arguments(method: str, shards: Path, out: Path, *more: str) -> list[str]:
    data = [f"data.train={shards / 'train'}", f"run.out={out}"]
    if method == "vjepa":
        data += [
            f"online_probe.train={shards / 'train'}",
            f"online_probe.test={shards / 'test'}",
            "online_probe.every=3",
            "online_probe.samples=4",
        ]
    return [*METHODS[method], *BOTH, *data, *more]


def predictor_arguments(name: str, shards: Path, out: Path) -> list[str]:
    """One step of a masked prediction with a predictor of PREDICTORS."""
    method = str(ROOT / "configs/method/videomae_tiny.yaml")
    data = [f"data.train={shards / 'train'}", f"run.out={out}", "run.steps=1", "model.depth=1"]
    return [method, *BOTH, *data, *PREDICTORS[name]]


def go(
    argv: list[str], stop: int = STEPS, observe: Callable[[Strategy, nn.Module], None] | None = None
) -> None:
    """train.main, cut off in a step (0..); `observe` sees the gradients of step 2.

    Of VideoMAE the losses of steps 3 and 4 are spoiled in the first process.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    clip, reduce = Strategy.clip, Strategy.reduce_metrics
    spoil = "run.max_consecutive_skips=1" in argv
    current = 0

    def cut_off(self, model, config, step):
        nonlocal current
        current = step
        if step == stop:
            raise KeyboardInterrupt
        if step == 2 and observe is not None:
            observe(self, model)
        return clip(self, model, config, step)

    def spoiled(self, means, sums):
        if spoil and current in (3, 4) and self.rank == 0:
            means["loss"] = means["loss"] * float("nan")
        return reduce(self, means, sums)

    Strategy.clip, Strategy.reduce_metrics = cut_off, spoiled  # type: ignore[method-assign]
    try:
        train.main(argv)
    except KeyboardInterrupt:
        assert stop < STEPS
    finally:
        Strategy.clip, Strategy.reduce_metrics = clip, reduce  # type: ignore[method-assign]


def launcher_variables(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes."""
    args = launch_command_parser().parse_args(
        ["--config_file", str(LAUNCH[name]), "--num_processes", "8", "vidssl/train.py"]
    )
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {k: v for k, v in env.items() if k.startswith(("ACCELERATE_", "FSDP_"))}


def share(tensors) -> float:
    """Fraction of the elements that this process holds."""
    pairs = [(t.to_local().numel() if isinstance(t, DTensor) else t.numel(), t.numel()) for t in tensors]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs)


def write_shares(out: Path, strategy: Strategy, model: nn.Module) -> None:
    """Write how much of the weights, moments and gradients this process holds, and the types of the FSDP
    units."""
    (optimizer,) = strategy.accelerator._optimizers
    children = {n: [*m.parameters()] for n, m in getattr(model, "module", model).named_children()}
    shares: dict[str, Any] = {n: share(p) for n, p in children.items() if len(p) > 1}
    if isinstance(strategy, deepspeed.Zero):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        pieces = [g for p in model.parameters() if (g := gradient_fragment(p)) is not None]
        moments = strategy.optimizer.engine.optimizer.state.values()
        shares["moments"] = sum(s["exp_avg"].numel() for s in moments) / trained
        shares["gradients"] = sum(g.numel() for g in pieces) / trained
        shares["whole"] = sum(p.grad is not None for p in model.parameters())
    else:
        shares["moments"] = share([s["exp_avg"] for s in optimizer.state.values()])
        shares["units"] = sorted(type(m).__name__ for m in model.modules() if isinstance(m, FSDPModule))
    out.mkdir(parents=True, exist_ok=True)
    (out / f"shares-{strategy.rank}.json").write_text(json.dumps(shares))


def forbidden_read(path: Path) -> None:
    raise AssertionError(f"{path}: only the first process may read a checkpoint")


def one_process(plan: dict, world: int, jobs: list, rank: int, port: int) -> None:
    set_rank(world, rank, port)
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
    enable_cpu_sharding()
    if rank:
        checkpoint.load_file = forbidden_read
    for launch, argv, stop in jobs:
        os.environ |= {
            **dict.fromkeys(("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"), "false"),
            **plan["launch"][launch],
        }
        out = Path(next(a for a in argv if a.startswith("run.out=")).removeprefix("run.out="))
        go(argv, stop, partial(write_shares, out) if launch in ("fsdp2", "zero1", "zero2") else None)
        torch.distributed.barrier()  # the next job may continue in the same folder


def run_plan(plan: dict) -> None:
    for world, jobs in plan["groups"]:
        fork_world(world, partial(one_process, plan, world, jobs))


LOGGED = ("fsdp2", "zero1")  # where several steps have one row
MANY = ["videomae-ddp-2", "videomae-fsdp2-2", "videomae-zero1-2", "videomae-fsdp2-4"]
MANY += ["vjepa-ddp-2", "vjepa-fsdp2-2", "vjepa-zero1-2", "vjepa-zero2-2", "vjepa-ddp-4", "videomae-zero2-4"]


@pytest.fixture(scope="module")
def runs(synthetic_shards, tmp_path_factory) -> Path:
    """Folders METHOD-1, and METHOD-LAUNCH-WORLD of several processes. `down` went from whole models on two
    processes to shards on two to one process, `up` from one process to shards on four to whole models on two,
    `over` on two processes from ZeRO-2 to shards to ZeRO-1."""
    out = tmp_path_factory.mktemp("scale")

    def job(launch: str, name: str, *more: str, stop: int = STEPS, method: str = "vjepa") -> list:
        return [launch, arguments(method, synthetic_shards, out / name, *more), stop]

    def group(world: int, *more: str) -> list:
        names = [name.split("-") for name in MANY if name.endswith(str(world))]
        return [
            job(launch, f"{method}-{launch}-{world}", *more, method=method) for method, launch, _ in names
        ]

    for method in METHODS:
        go(job("", f"{method}-1", method=method)[1])
    go(job("", "up")[1], SAVE)
    four = [*group(4, "efficiency.activation_checkpointing=true"), job("fsdp2", "up", stop=2 * SAVE)]
    two = [*group(2, "efficiency.micro_batches=2"), job("ddp", "up")]
    two += [job("ddp", "down", stop=SAVE), job("kept", "down", stop=2 * SAVE)]
    two += [job("zero2", "over", stop=SAVE), job("fsdp2", "over", stop=2 * SAVE), job("zero1", "over")]
    branch = [f"run.init={out / 'vjepa-1/checkpoints' / f'step-{2 * SAVE:08d}'}", "run.steps=2", "run.seed=1"]
    two += [job(name, f"branch-{name}", *branch) for name in ("ddp", "zero1")]
    two += [
        job(name, f"bf16-{name}", "efficiency.precision=bf16", stop=2) for name in ("ddp", "fsdp2", "zero2")
    ]
    for name in PREDICTORS:
        go(predictor_arguments(name, synthetic_shards, out / f"{name}-1"))
        two.append(["fsdp2", predictor_arguments(name, synthetic_shards, out / f"{name}-2"), STEPS])
    no_rollback = "run.max_consecutive_skips=3"
    go(job("", "logged-1", no_rollback, method="videomae")[1])
    for name in LOGGED:
        two.append(job(name, f"logged-{name}", no_rollback, "run.log_every=4", method="videomae"))
    launch = {name: launcher_variables(name) for name in LAUNCH}
    launch["kept"] = launch["fsdp2"] | {"FSDP_RESHARD_AFTER_FORWARD": "false"}
    plan = {"launch": launch, "groups": [[4, four], [2, two]]}
    (out / "plan.json").write_text(json.dumps(plan))
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, __file__, out / "plan.json"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    go(job("", "down")[1])
    return out


def rows(run: Path) -> list[dict]:
    """The log's rows, with NaN for the null that it holds where a skipped step's loss is not finite."""
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in logged]


@pytest.mark.parametrize("name", [*MANY, "up", "down", "over"])
def test_the_same_run_on_any_number_of_processes_whole_or_in_shards(name, runs):
    one = rows(runs / f"{'videomae' if 'videomae' in name else 'vjepa'}-1")
    many = rows(runs / name)
    assert [r["samples_hash"] for r in many] == [r["samples_hash"] for r in one] and len(one) == STEPS
    # the time of a checkpoint is in the row of the next step, so not in the first row of a continued run
    assert [r.keys() - {"save_s"} for r in many] == [r.keys() - {"save_s"} for r in one]
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in many] == pytest.approx([r[key] for r in one], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_predictor_takes_the_same_step_in_shards(name, runs):
    whole, shards = (tensors(runs / f"{name}-{world}", "checkpoints/step-00000001/model") for world in (1, 2))
    assert list(shards) == list(whole)
    assert max(float((shards[k] - whole[k]).abs().max()) for k in whole) < 1e-5
    (one,), (two,) = (rows(runs / f"{name}-{world}") for world in (1, 2))
    for key in ("loss", "grad_norm"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)


def test_feature_stats_and_online_probe_are_the_same_in_shards(runs):
    """They are of the clips of all processes; those of the target depend on their number."""
    whole, *others, one = (
        [
            {k: v for k, v in r.items() if k.startswith(("feature_", "online_probe_"))}
            for r in rows(runs / f"vjepa-{name}")
        ]
        for name in (*(f"{launch}-2" for launch in LAUNCH), "1")
    )
    assert [len(r) for r in whole] == [16, 0, 18, 0, 0, 18]
    for shards in others:
        assert all(a == pytest.approx(b, rel=1e-3) for a, b in zip(shards, whole, strict=True))
    for row in (*whole, *one):
        row.pop("feature_target_var", None)
        row.pop("feature_drift_features", None)
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in zip(whole, one, strict=True))


def test_steps_that_are_not_taken_and_going_back_are_the_same_in_shards(runs):
    for name in ("1", *(n.removeprefix("videomae-") for n in MANY if "videomae" in n)):
        assert [r["skipped"] for r in rows(runs / f"videomae-{name}")] == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize("name", LOGGED)
def test_steps_that_the_host_reads_together_are_the_same(name, runs):
    """Two are spoiled in the first process only. Rows end with 4 steps, a measurement or a checkpoint."""
    logged = runs / f"logged-{name}"
    want, got = (tensors(run, FILES[2]) for run in (runs / "logged-1", logged))
    assert list(got) == list(want) and max(float((got[k] - want[k]).abs().max()) for k in want) < 1e-5
    assert [(r["step"], r.get("steps", 1), r["skipped"]) for r in rows(logged)] == [
        *((1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 1)),
        (6, 2, 2),
    ]


@pytest.mark.parametrize("name", [n for n in MANY if "zero" in n])
def test_zero_cuts_moments_and_gradients(name, runs):
    for rank in range(int(name[-1])):
        told = json.loads((runs / name / f"shares-{rank}.json").read_text())
        assert [told["moments"], told["gradients"]] == pytest.approx([1 / int(name[-1])] * 2, abs=0.02)
        assert told["whole"] == 0


@pytest.mark.parametrize("name", [n for n in MANY if "fsdp2" in n])
def test_shards_are_shards(name, runs):
    """EMA encoder and optimizer state too; each block is a unit, all other parameters are the last one."""
    world = int(name[-1])
    parts = ["encoder", "predictor", "moments"]
    for rank in range(world):
        told = json.loads((runs / name / f"shares-{rank}.json").read_text())
        assert told.pop("units") == ["FSDPBlock"] * (1 + 1 if "videomae" in name else 2 + 2 + 1) + [
            "FSDPMaskedPrediction"
        ]
        parts_here = parts if "videomae" in name else [*parts, "target"]
        assert told == pytest.approx(dict.fromkeys(parts_here, 1 / world), abs=0.02)


def tensors(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"{name}.safetensors")


FILES = [
    "encoder",
    "encoder_online",
    f"checkpoints/step-{STEPS:08d}/model",
    f"checkpoints/step-{STEPS:08d}/optimizer",
]


@pytest.mark.parametrize("name", FILES)
def test_a_run_may_change_between_whole_models_shards_and_one_process(name, runs):
    want = tensors(runs / "vjepa-1", name)
    for run in ("down", "up", "over", *(n for n in MANY if "vjepa" in n)):
        got = tensors(runs / run, name)
        assert list(got) == list(want)
        assert max(float((got[k] - want[k]).abs().max()) for k in want) < 1e-5, run


def test_the_files_have_one_layout(runs):
    """Names, types, shapes and places in the file; and what stands beside the tensors."""

    def layout(run: str) -> list:
        place = runs / run / f"checkpoints/step-{STEPS:08d}"
        heads = []
        for name in ("model", "optimizer"):
            data = (place / f"{name}.safetensors").read_bytes()
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            assert header.pop("__metadata__").keys() == {"content_sha256"}
            heads.append(header)
        plain = json.loads((place / "state.json").read_text())
        return [*heads, plain["groups"], sorted(plain), plain["guard"].keys(), plain["feature_stats"].keys()]

    assert {name: layout(f"vjepa-{name}-2") for name in LAUNCH} == dict.fromkeys(LAUNCH, layout("vjepa-1"))


def test_a_branch_starts_with_the_moments_of_its_trunk_in_pieces_too(runs):
    whole, cut = (
        tensors(runs / f"branch-{name}", "checkpoints/step-00000002/optimizer") for name in ("ddp", "zero1")
    )
    assert list(whole) == list(cut) and all(torch.allclose(whole[k], cut[k], atol=1e-7) for k in whole)
    assert {float(v) for k, v in cut.items() if k.endswith("step")} == {2.0 * SAVE + 2}


@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
def test_bf16_in_shards(name, runs):
    one, whole, cut = (
        [r["loss"] for r in rows(runs / run)] for run in ("vjepa-1", "bf16-ddp", f"bf16-{name}")
    )
    assert (
        cut == pytest.approx(whole, rel=1e-3) and cut == pytest.approx(one[:2], rel=0.03) and cut != one[:2]
    )


# Compiled


def test_compiled_blocks_take_the_same_steps_under_the_same_names(synthetic_shards, tmp_path, monkeypatch):
    """As torch.compile takes them apart; a C++ compiler's minute for its last part is not spent here."""
    backend = partial(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(Block, "compile", lambda self, **options: backend(self, **options))
    counters.clear()
    same = ["model.depth=2", "run.steps=2"]
    for name, more in (("plain", []), ("compiled", ["efficiency.compile=true"])):
        go(arguments("vjepa", synthetic_shards, tmp_path / name, *same, *more))
    plain, compiled = rows(tmp_path / "plain"), rows(tmp_path / "compiled")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in compiled] == pytest.approx([r[key] for r in plain], rel=1e-5)
    want, got = (
        tensors(tmp_path / name, "checkpoints/step-00000002/model") for name in ("plain", "compiled")
    )
    assert list(got) == list(want) and all(torch.allclose(got[k], want[k], atol=1e-5) for k in want)
    assert 0 < counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"]


def test_another_kernel_of_the_optimizer_can_continue_a_run(synthetic_shards, tmp_path):
    for name, first in (("same", "true"), ("other", "false")):
        for stop, fused in ((SAVE, first), (STEPS, "true")):
            go(arguments("vjepa", synthetic_shards, tmp_path / name, f"efficiency.fused={fused}"), stop)
    same, other = (tensors(tmp_path / name, FILES[2]) for name in ("same", "other"))
    assert all(torch.allclose(same[k], other[k], atol=1e-6) for k in same)
    groups = json.loads((tmp_path / "other" / f"checkpoints/step-{STEPS:08d}/state.json").read_text())[
        "groups"
    ]
    assert [g["fused"] for g in groups] == [True, True]


# What starts them


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    "variables, words",
    [
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "give 1 or 2.*configs/accelerate/fsdp2.yaml"),
        (ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "mine.json"}, "give zero_stage: 1 or 2"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"},
            "offload_optimizer_device: only none",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "use efficiency.activation_checkpointing=true",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(variables, words, synthetic_shards, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as refused:
        go(arguments("vjepa", synthetic_shards, tmp_path / "run"))
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "run").exists()


def test_deepspeed_is_refused_in_a_line_where_it_cannot_be(synthetic_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"DeepSpeed does not support efficiency\.precision=fp16"):
        go(arguments("vjepa", synthetic_shards, tmp_path / "run", "efficiency.precision=fp16"))
    with pytest.raises(UserError, match="image_tokenizer: DeepSpeed decays"):
        go(arguments("vjepa", synthetic_shards, tmp_path / "run", "model.image_tokenizer=true"))
    deepspeed.zero_plugin("bf16").select(_from_accelerator_state=True)  # as Accelerate does on GPUs
    for name in ("transformers", "deepspeed"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=f"{name} is not installed: pip install 'vidssl.deepspeed.'"):
            go(arguments("vjepa", synthetic_shards, tmp_path / "run"))


def test_what_deepspeed_cannot_do_right_is_an_error():
    """A version that takes a step whose gradients are not finite; moments of some parameters of many."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    inner = SimpleNamespace(overflow=False, refresh_fp32_params=lambda: None, optimizer=None)
    sharded = deepspeed.ZeroOptimizer(
        SimpleNamespace(step=lambda: None, optimizer=inner), [{"params": params}]
    )
    with pytest.raises(UserError, match=r"pip install 'deepspeed>=0\.19\.8'"):
        sharded.skip_step()
    inner.overflow = True
    sharded.skip_step()
    with pytest.raises(UserError, match=r"2 of 3 parameters have no moments .*fsdp2\.yaml"):
        sharded.scatter_moments(params[:1], [{}])


def test_the_launcher_configurations_ask_for_what_they_say():
    ddp, fsdp2 = launcher_variables("ddp"), launcher_variables("fsdp2")
    assert "ACCELERATE_USE_FSDP" not in ddp
    asked = {k: fsdp2[k] for k in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD")}
    assert asked == {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    assert fsdp2["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    stages = {
        name: launcher_variables(name)["ACCELERATE_DEEPSPEED_ZERO_STAGE"] for name in ("zero1", "zero2")
    }
    assert stages == {"zero1": "1", "zero2": "2"}


@pytest.fixture
def cluster(tmp_path, monkeypatch) -> Path:
    """A folder, first on the PATH, with a trainer that tells of itself and ends as asked, and SLURM's
    commands."""
    programs = {
        "python": 'trap "kill \\$!; exit 75" TERM\n'
        'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> "$TOLD"\n'
        'if [ -n "${WAIT-}" ]; then sleep 300 & wait; fi; exit $(cut -d " " -f $((RANK + 1)) <<< "$STATUS")',
        "srun": 'r=0; for n in 0 1; do SLURM_NODEID=$n "$@"; s=$?; '
        "if ((s > r)); then r=$s; fi; done; exit $r",
        "scontrol": 'if [ "$1" = show ]; then echo n0; echo n1; else echo "$*" >> "$TOLD"; fi',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TOLD": str(tmp_path / "told"),
        "GPUS": "2",
        "NODES": "2",
    }
    slurm = {"SUBMIT_DIR": ROOT, "NNODES": 2, "GPUS_ON_NODE": 2, "JOB_NODELIST": "n[0-1]", "JOB_ID": 7}
    for name, value in {**variables, **{f"SLURM_{k}": v for k, v in slurm.items()}}.items():
        monkeypatch.setenv(name, str(value))
    return tmp_path


@pytest.mark.parametrize(
    "each, status",
    [
        ("0 0 0 0", 0),
        ("75 75 75 75", 75),
        ("0 75 0 75", 75),
        ("134 75 134 134", 75),
        ("75 2 75 75", 2),
        ("75 75 1 134", 1),
    ],
)
def test_the_status_that_asks_for_more_reaches_the_scheduler_and_no_failure_hides_behind_it(
    each, status, cluster
):
    done = subprocess.run(
        ["bash", ROOT / "tools/launch/slurm.sh", "a.yaml", "run.out=with space"],
        env={**os.environ, "STATUS": each},
    )
    assert done.returncode == status
    lines = (cluster / "told").read_text().splitlines()
    told = [f"{i} {i % 2} 4 n0 20007 vidssl/train.py a.yaml run.out=with space" for i in range(4)]
    assert sorted(lines[:4]) == told
    assert lines[4:] == (["requeue 7"] if status == 75 else [])


@pytest.mark.parametrize(("restarts", "again"), [("99", True), ("100", False)])
def test_a_job_is_queued_again_a_limited_number_of_times(restarts, again, cluster):
    done = subprocess.run(
        ["bash", ROOT / "tools/launch/slurm.sh", "a.yaml"],
        env={**os.environ, "STATUS": "75 75 75 75", "SLURM_RESTART_COUNT": restarts},
    )
    assert done.returncode == 75
    assert ("requeue 7" in (cluster / "told").read_text()) is again


def test_sigterm_to_the_first_process_of_a_node_reaches_all(cluster):
    """As Kubernetes sends it."""
    env = {**os.environ, "NODE": "0", "MASTER_ADDR": "here", "WAIT": "1", "STATUS": "1 1"}
    node = subprocess.Popen(["bash", ROOT / "tools/launch/node.sh"], env=env)
    until = time.time() + 120
    while not ((cluster / "told").exists() and len((cluster / "told").read_text().splitlines()) == 2):
        assert time.time() < until
        time.sleep(0.01)
    node.terminate()
    assert node.wait(120) == 75


def test_the_commands_of_the_launch_examples_compose(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "tools/launch/slurm.sh").read_text()
    by_slurm = text.split("sbatch tools/launch/slurm.sh", 1)[1].split("# Two minutes")[0]
    service, job = yaml.safe_load_all((ROOT / "tools/launch/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {e["name"]: e["value"] for e in container["env"]}
    for argv, world in (
        (by_slurm.replace("\\", "").replace("#", "").split(), 2 * 8),
        (container["args"], int(env["NODES"]) * int(env["GPUS"])),
    ):
        cfg = load_config(argv, TrainConfig)
        run = cfg.run
        assert run.batch % run.lanes == 0 == run.lanes % world
        clips = run.batch // world // cfg.efficiency.micro_batches
        assert clips == cfg.method.mask.arguments["truncate_over"] == 24
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(env["NODES"])
    assert env["MASTER_ADDR"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"] and pod["restartPolicy"] == "Never"
    rules = {
        r["action"]: r["onExitCodes"]["values"]
        for r in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in r
    }
    assert (
        rules == {"FailJob": [2], "Ignore": [EXIT_REQUEUE]}
        and f"--signal=TERM@{pod['terminationGracePeriodSeconds']}" in text
    )
    assert f"status == {EXIT_REQUEUE}" in text and job["spec"]["activeDeadlineSeconds"]


if __name__ == "__main__":
    run_plan(json.loads(Path(sys.argv[1]).read_text()))
