"""Nothing in `efficiency:` changes a result: every method takes the same steps in any number of parts, on any
number of processes, and with recomputed activations.

`python tests/distributed/test_efficiency.py WORLD FOLDER` takes the steps of all methods in WORLD forked
processes; the folder gets a file of losses, gradients and weights for each.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from forked_world import fork_world, set_rank
from safetensors.torch import load_file, save_file

from vidssl.data.loader import Batch
from vidssl.objective.masks import count_cut_groups
from vidssl.training.blocks import configure_blocks
from vidssl.training.config_checks import check_batch
from vidssl.training.distributed import Strategy
from vidssl.training.micro_batches import PartMaker
from vidssl.training.optim import build_optimizer, schedule, schedule_progress, set_schedule
from vidssl.training.schema import TrainConfig
from vidssl.training.step import forward_backward

ROOT = Path(__file__).parents[2]
METHODS = sorted(p.stem for p in (ROOT / "configs/method").glob("*.yaml"))
CUT = [m for m in METHODS if "truncate_over" in (ROOT / f"configs/method/{m}.yaml").read_text()]
# of methods whose masks are cut over N clips METHOD/N: over four, and over all of a step
RUNS = [r for m in METHODS for r in ([m] if m not in CUT else [f"{m}/4", f"{m}/16"])]
CLIPS, STEPS = 16, 2
PARTS = {1: (1, 2, 4), 2: (1, 2, 4), 4: (1, 4)}  # processes: micro-batches
RECOMPUTED = "recomputed"
TOLERANCE = 1e-5  # of a tensor's largest entry; 2e-6 was measured
# Adam divides a gradient by its own size, so an entry that is nearly zero moves by its rounding; the large
# eps of `configure` damps that.
WEIGHT_TOLERANCE = 5e-5
VARIANTS = [f"{world}x{parts}" for world in PARTS for parts in PARTS[world]] + [f"1x1-{RECOMPUTED}"]
# Parts that other methods share: all variants. The others are tried on two processes and in two parts.
THOROUGH = (
    "mae",
    "mae_st",
    "videomae",
    "videomaev2",
    "ijepa",
    "vjepa",
    "vjepa2",
    "vjepa2_1",
    "vjepa2_1_distilled",
)
FEW_VARIANTS = ["1x1", "1x2", "2x1"]


def variants_of(run: str, couples_clips: bool) -> list[str]:
    """The variants of a run; a method that compares the clips of a step has no parts."""
    variants = VARIANTS if run.partition("/")[0] in THOROUGH else FEW_VARIANTS
    return [v for v in variants if not couples_clips or v.partition("x")[2][0] == "1"]


def configure(run: str, folder: Path) -> TrainConfig:
    """The method's file with tiny sizes, and stochastic depth."""
    from test_methods import make_teacher, small  # of tests/integration

    method, _, over = run.partition("/")
    more = ["model.drop_path=0.3", f"run.batch={CLIPS}", "optim.eps=1e-2", *make_teacher(method, folder)]
    return small(method, *more, *([f"method.mask.truncate_over={over}"] if over else []))


def batch_at(step: int, frames: int, rank: int, world: int) -> Batch:
    """A process's clips, each a function of its position: noise and a colour in equal parts, since batch norm
    over clips of noise alone, whose features hardly differ, magnifies rounding."""
    positions = [step * CLIPS + j for j in range(CLIPS) if j % world == rank]
    clips = []
    for p in positions:
        generator = torch.Generator().manual_seed(p)
        colour = torch.randint(0, 128, (3, 1, 1, 1), generator=generator)
        noise = torch.randint(0, 128, (3, frames, 32, 32), generator=generator)
        clips.append((colour + noise).byte())
    return Batch(torch.stack(clips), torch.zeros(len(clips)), torch.tensor(positions), [""] * len(clips), [])


def take_steps(cfg: TrainConfig, parts: int, recomputed: bool) -> dict[str, torch.Tensor]:
    """Losses, gradients of the first step, and the weights after all steps."""
    from test_methods import cancelled_biases  # of tests/integration

    strategy = Strategy.from_env(cfg.efficiency, unused_parameters=cfg.model.arguments["image_tokenizer"])
    check_batch(cfg, strategy.world)
    objective = cfg.build_objective()
    configure_blocks(objective, activation_checkpointing=recomputed)
    model, optimizer = strategy.prepare(objective, build_optimizer(objective, cfg.optim))
    make_parts = PartMaker(objective, strategy, 0, parts, partial(count_cut_groups, objective.mask))
    found = {}
    for step in range(STEPS):
        hparams = schedule(cfg.optim, step, STEPS, objective.momentum)
        set_schedule(optimizer, hparams)
        optimizer.zero_grad()
        batches = [batch_at(step, cfg.data.frames, strategy.rank, strategy.world)]
        losses = forward_backward(strategy, model, make_parts(step, batches))
        if step == 0:
            named = objective.named_parameters()
            found |= {f"gradient {n}": p.grad.clone() for n, p in named if p.grad is not None}
        norm = strategy.clip(model, cfg.optim, step)
        metrics = strategy.all_reduce_metrics({**losses, "grad_norm": norm}, {})
        found |= {f"{name} {step}": torch.tensor(value) for name, value in metrics.items()}
        strategy.step(optimizer)
        objective.update(schedule_progress(cfg.optim, step, STEPS))
    found |= {f"weight {n}": p.detach().clone() for n, p in objective.named_parameters()}
    rounding = cancelled_biases(objective)
    return {name: value for name, value in found.items() if name.partition(" ")[2] not in rounding}


def one_process(world: int, out: Path, rank: int, port: int) -> None:
    if world > 1:
        set_rank(world, rank, port)
    PartialState.destroy_process_group = lambda *_: None  # type: ignore[method-assign]
    torch.set_num_threads(1)
    teacher = out / f"teacher-{world}-{rank}"
    teacher.mkdir(exist_ok=True)
    for run in RUNS:
        cfg = configure(run, teacher)
        couples_clips = cfg.build_objective().couples_clips
        if couples_clips and rank == 0:
            (out / f"{run.replace('/', '-')}.coupled").touch()
        for variant in variants_of(run, couples_clips):
            if not variant.startswith(f"{world}x"):
                continue
            parts = int(variant.partition("x")[2][0])
            found = take_steps(cfg, parts, variant.endswith(RECOMPUTED))
            if rank == 0:
                save_file(found, out / f"{run.replace('/', '-')}-{variant}.safetensors")


@pytest.fixture(scope="module")
def steps(tmp_path_factory) -> Path:
    """A folder with the file RUN-WORLDxPARTS of each run and variant."""
    out = tmp_path_factory.mktemp("steps")
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}:{ROOT / 'tests/integration'}"}
    for world in PARTS:
        command = [sys.executable, __file__, str(world), out]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return out


def deviation(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], of_weights: bool) -> float:
    """Largest difference, relative to the largest entry of its tensor or a thousandth of the largest
    gradient; of the weights, or of all else."""
    assert got.keys() == want.keys()
    gradients = [float(t.abs().max()) for name, t in want.items() if name.startswith("gradient ")]
    least = 1e-3 * max(gradients)
    return max(
        float((got[name] - t).abs().max()) / max(least, float(t.abs().max()))
        for name, t in want.items()
        if name.startswith("weight ") == of_weights
    )


@pytest.mark.parametrize("run", RUNS)
def test_neither_parts_nor_processes_nor_recomputation_change_a_step(run, steps):
    name = run.replace("/", "-")
    want = load_file(steps / f"{name}-1x1.safetensors")
    for variant in variants_of(run, (steps / f"{name}.coupled").exists())[1:]:
        got = load_file(steps / f"{name}-{variant}.safetensors")
        assert deviation(got, want, of_weights=False) < TOLERANCE, variant
        assert deviation(got, want, of_weights=True) < WEIGHT_TOLERANCE, variant


@pytest.mark.parametrize("method", CUT)
def test_the_clips_that_are_cut_together_do_change_a_step(method, steps):
    """So that the equalities above are not of masks that are never cut."""
    four, all_clips = (
        load_file(steps / f"{name}-1x1.safetensors") for name in (f"{method}-4", f"{method}-16")
    )
    assert deviation(four, all_clips, of_weights=False) > 0.01


if __name__ == "__main__":
    fork_world(int(sys.argv[1]), partial(one_process, int(sys.argv[1]), Path(sys.argv[2])))
