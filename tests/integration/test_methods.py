"""Every method's YAML builds and gives the losses in tests/losses/NAME.txt.

python tests/integration/test_methods.py [NAME ...] writes them: for a new method, or after a change that is
meant to move them (the commit says why).
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from given_networks import ColourFlow, RedLevels, write_network

from vidssl.config import declarations, load_config, to_tree
from vidssl.core.pixels import normalise
from vidssl.core.rng import KeyedRNG
from vidssl.objective.objective import Objective
from vidssl.objective.projector import Projector
from vidssl.objective.schema import PREDICTOR_PARTS
from vidssl.pretrained.init import save_run_encoder, to_checkpoint
from vidssl.training.distributed import Strategy
from vidssl.training.optim import build_optimizer, schedule, schedule_progress, set_schedule
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[2]
METHODS = sorted(p.stem for p in (ROOT / "configs/method").glob("*.yaml"))
PUBLISHED = [m for m in METHODS if not m.endswith("_tiny")]
STEPS = 5
IMAGE_PARTS = ("encoder.patch_embed_img.", "encoder.img_mod_embed")  # no gradients from videos
RUN = ["run.out=x", f"run.steps={STEPS}", "run.batch=8", "data.train=x"]
SMALL = ["data.stride=1", "augment.kind=center_crop", "augment.size=32", "optim.warmup=0", "optim.lr=1e-3"]
SMALL += ["model.kind=vit", "model.dim=48", "model.depth=2", "model.heads=3", "model.patch=8"]
PREDICTOR = {"width": 24, "depth": 1, "heads": 2}
# They compare clips with each other. Of clips of noise alone, whose features are nearly equal, batch norm or
# a centre magnifies a processor's rounding (AVX2 and AVX-512: 1e-3 after five steps, with colours 2e-6).
COLOURED = ("byol", "dino", "moco_v3", "simclr", "simsiam", "swav", "vicreg")
TINY = ROOT / "tests/tiny_methods"  # files of keys that a method needs beside these


def own(method: str) -> dict[str, Any]:
    """The method's file as it stands."""
    return yaml.safe_load((ROOT / f"configs/method/{method}.yaml").read_text())


def small(method: str, *more: str) -> TrainConfig:
    """The method's file with tiny sizes and schedules that start at once; everything else is the file's."""
    model = own(method).get("model", {})
    fit = [f"data.frames={1 if model.get('tubelet') == 1 else 8}"]
    fit += ["model.levels=[0,1]"] if "levels" in model else []
    fit += ["method.context.warmup=[0,0]"] if "context" in own(method)["method"] else []
    predictor = own(method)["method"].get("predictor")
    sizes = declarations(PREDICTOR_PARTS[predictor["kind"]]) if predictor else ()
    fit += [f"method.predictor.{key}={value}" for key, value in PREDICTOR.items() if key in sizes]
    if (tiny := TINY / f"{method}.yaml").exists():
        fit += [f"{key}={json.dumps(value)}" for key, value in flat(yaml.safe_load(tiny.read_text()))]
    return load_config([str(ROOT / f"configs/method/{method}.yaml"), *RUN, *SMALL, *fit, *more], TrainConfig)


def flat(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of the leaves of a tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def cancelled_biases(objective: Objective) -> set[str]:
    """Parameters whose gradients are zero but for rounding: the last bias of an encoder that batch norm
    follows."""
    norms = [m for m in objective.modules() if isinstance(m, Projector) and m.couples_clips]
    return {f"{prefix}encoder.norm.bias" for prefix in ("", "average.")} if norms else set()


def make_teacher(method: str, folder: Path) -> list[str]:
    """Writes the small networks that the method needs into the folder. Returns the arguments that name
    them."""
    if own(method)["method"].get("score", {}).get("kind") == "warp":
        return [f"method.score.flow={write_network(ColourFlow(), folder / 'flow.pt')}"]
    target = own(method)["method"].get("target", {})
    if target.get("kind") == "given_tokens":
        path = write_network(RedLevels(), folder / "red.pt")
        return [f"method.target.path={path}", "method.target.vocabulary=10"]
    if target.get("kind") == "teacher":
        write_teacher(folder, target.get("frames") == "apart")
        return [f"method.target.path={folder}"]
    if target.get("kind") == "teachers":
        folders = [folder / str(i) for i in range(len(target["frames"]))]
        for path, frames in zip(folders, target["frames"], strict=True):
            path.mkdir(exist_ok=True)
            write_teacher(path, frames == "apart")
        return [f"method.target.paths={json.dumps([str(path) for path in folders])}"]
    return []


def write_teacher(folder: Path, of_images: bool) -> None:
    larger = small("mae" if of_images else "vjepa2_1", "model.dim=64", "model.heads=4", "run.seed=1")
    objective = larger.build_objective()
    predictor = larger.method.predictor
    found = to_checkpoint(objective, larger.encoder_arguments(), predictor, objective.state_dict())
    save_run_encoder(folder, found, {"config": to_tree(larger), "step": 0}, snapshot=False)


def moving_noise(frames: int, coloured: bool) -> torch.Tensor:
    """u8 [8, 3, T, 32, 32]: noise that moves to the right. coloured: half of it is a colour of the clip."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (8, 3, 1, 32, 32), dtype=torch.uint8, generator=generator)
    if coloured:
        noise = noise // 2 + torch.randint(0, 128, (8, 3, 1, 1, 1), dtype=torch.uint8, generator=generator)
    return torch.cat([noise.roll(t, -1) for t in range(frames)], 2)


def losses(cfg: TrainConfig, video: torch.Tensor) -> list[float]:
    """Five steps of a tiny encoder on clips u8 [8, 3, T, 32, 32]."""
    objective = cfg.build_objective()
    optim = cfg.optim
    optimizer = build_optimizer(objective, optim)
    strategy = Strategy(Accelerator())
    positions = torch.arange(8)
    out = []
    for step in range(STEPS):
        now = schedule(optim, step, STEPS, objective.momentum)
        set_schedule(optimizer, now)
        loss = objective(normalise(video), KeyedRNG(0, step, positions + 8 * step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        strategy.clip(objective, optim, step)
        optimizer.step()
        objective.update(schedule_progress(optim, step, STEPS))
        out.append(loss.item())
    return out


def losses_of(method: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        cfg = small(method, *make_teacher(method, Path(folder)))
        return losses(cfg, moving_noise(cfg.data.frames, method in COLOURED))


def write(method: str) -> str:
    return "".join(f"{step} {loss:.6f}\n" for step, loss in enumerate(losses_of(method)))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_every_trainable_parameter_and_no_other(method, tmp_path):
    cfg = small(method, *make_teacher(method, tmp_path))
    objective = cfg.build_objective()
    video = torch.randn(8, 3, cfg.data.frames, 32, 32, generator=torch.Generator().manual_seed(0))
    for step in range(2):  # what starts at zero may hold back the gradients of others for a step
        objective.zero_grad()
        objective(video, KeyedRNG(0, step, torch.arange(8)))["loss"].backward()
        with torch.no_grad():
            for p in objective.parameters():
                p.add_(0 if p.grad is None else p.grad, alpha=-1e-2)
    reached = {n for n, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    trainable = {n for n, p in objective.named_parameters() if p.requires_grad}
    wrong = (reached ^ trainable) - cancelled_biases(objective)
    assert sorted(n for n in wrong if not n.startswith(IMAGE_PARTS)) == []


@pytest.mark.parametrize("method", METHODS)
def test_golden_losses(method):
    golden = [
        float(line.split()[1]) for line in (ROOT / f"tests/losses/{method}.txt").read_text().splitlines()
    ]
    assert losses_of(method) == pytest.approx(golden, rel=1e-4)  # other processors round differently
    # Classes of a pretext are drawn anew in each step; the loss of DINO rises until its centre has settled
    if "pretext" not in own(method)["method"] and method != "dino":
        assert golden[-1] < golden[0]


@pytest.mark.parametrize("method", PUBLISHED)
def test_header_names_the_whole_recipe(method):
    """A method's file, with the model and the data file that its header names, is a whole configuration."""
    path = ROOT / f"configs/method/{method}.yaml"
    header = path.read_text().split("method:\n")[0]
    named = re.findall(r"\bmodel\.kind=\w+|\b(?:model|data)/\w+\.yaml", header)
    assert sorted(re.split(r"[./]", name)[0] for name in named) == ["data", "model"]
    given = [name if "=" in name else str(ROOT / "configs" / name) for name in named]
    kind = own(method)["method"].get("target", {}).get("kind")
    named = ["method.target.path=x"]
    paths = {"teacher": named, "given_tokens": named, "teachers": ["method.target.paths=[x,y]"]}
    given += paths.get(kind, [])
    given += ["method.score.flow=blocks"] if method == "mgmae" else []
    cfg = load_config([str(path), *RUN, *given], TrainConfig)
    size = cfg.augment.arguments["size"]
    with torch.device("meta"):  # sizes only
        frames = cfg.encoder_arguments()["frames"]
        encoder = cfg.model.build(frames=frames, height=size, width=size)
        if not cfg.method.agree.is_absent:
            cfg.method.agree.build(encoder=encoder).check_clip(cfg.data.clip_frames, size)
        if not cfg.method.predicts:
            return
        cfg.method.predictor.build(encoder=encoder, out=encoder.feature_width)
    mask = cfg.method.mask.build()
    video = torch.zeros(()).expand(2, 3, cfg.data.frames, size, size)
    rng = KeyedRNG(0, 0, torch.arange(2))
    grid = encoder.grid
    scored = cfg.method.mask.kind == "scored"
    # of a corrupted clip all tokens may be seen, and predicted
    limit = grid.n + (not cfg.method.corrupt.is_absent)
    for m in mask.from_scores(torch.rand(2, grid.n), grid, rng) if scored else mask(video, grid, rng):
        assert 0 < m.context.shape[1] < limit and 0 < m.target.shape[2] < limit


if __name__ == "__main__":
    for m in sys.argv[1:] or METHODS:
        (ROOT / f"tests/losses/{m}.txt").write_text(write(m))
