"""Those that bench_step.py lets take turns, each with its training step: ours, transformers', the published loop."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plain_vjepa import PlainLoop
from torch import Tensor, nn

from vidssl.config import load_config
from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import MODELS, TransformerStack
from vidssl.objective.objective import Objective
from vidssl.pretrained.export_hf import save_hf
from vidssl.pretrained.init import to_checkpoint
from vidssl.training.optim import build_optimizer
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[1]
DECODERS = {
    "vit_small": (192, 4, 3),
    "vit_base": (384, 4, 6),
    "vit_large": (512, 12, 8),
}  # VideoMAE: width, depth, heads
PAIRS = (
    ("vidssl VideoMAE", "transformers VideoMAE"),
    ("vidssl V-JEPA", "plain V-JEPA loop"),
    ("vidssl V-JEPA 2 encoder", "transformers VJEPA2Model"),
)
MOMENTUM = 0.999


class Contender(NamedTuple):
    forward: Callable[[Tensor, int], Tensor]  # (video, number of the step) -> loss
    finish: Callable[[], None]  # after the backward pass
    net: nn.Module  # whose parameters are trained
    bf16: bool = False

    def loss(self, video: Tensor, number: int) -> Tensor:
        """In bf16, if that was asked for; weights are cast anew, as they are in training."""
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.bf16):
            return self.forward(video, number)

    def step(self, video: Tensor, number: int) -> None:
        self.net.zero_grad()
        self.loss(video, number).backward()
        self.finish()


def draws(video: Tensor, number: int) -> KeyedRNG:
    return KeyedRNG(0, number, torch.arange(len(video), device=video.device) + number * len(video))


def build(method: str, model: str, device: str, *options: str) -> tuple[Objective, TrainConfig]:
    """A configuration in configs/, and its objective."""
    files = [
        str(ROOT / f"configs/{name}.yaml")
        for name in (f"method/{method}", f"model/{model}", "data/clips_16x4")
    ]
    cfg = load_config([*files, "run.out=x", "run.steps=1000", "run.batch=1", *options], TrainConfig)
    return cfg.build_objective().to(device), cfg


def ours(objective: Objective, cfg: TrainConfig, compiled: bool) -> Contender:
    """A step as train.py takes it."""
    objective = copy.deepcopy(objective)
    for module in objective.modules():
        for block in module if isinstance(module, TransformerStack) and compiled else ():
            block.compile(dynamic=True)
    optimizer = build_optimizer(objective, cfg.optim, fused=True)

    def finish() -> None:
        optimizer.step()
        objective.target.update(objective.encoder, MOMENTUM)

    return Contender(lambda video, number: objective(video, draws(video, number))["loss"], finish, objective)


def plain_loop(objective: Objective) -> Contender:
    loop = PlainLoop(copy.deepcopy(objective))
    optimizer = torch.optim.AdamW([p for p in loop.parameters() if p.requires_grad], lr=1e-4)

    def finish() -> None:
        optimizer.step()
        loop.update(MOMENTUM)

    return Contender(lambda video, number: loop(video, draws(video, number)), finish, loop)


def from_transformers(kind: str, objective: Objective, cfg: TrainConfig, device: str) -> nn.Module:
    """A model of transformers with our weights."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        arguments, predictor = cfg.encoder_arguments(), cfg.method.predictor
        save_hf(Path(folder), to_checkpoint(objective, arguments, predictor, objective.state_dict()))
        return getattr(transformers, kind).from_pretrained(folder).to(device)


def their_videomae(objective: Objective, cfg: TrainConfig, device: str) -> Contender:
    net = from_transformers("VideoMAEForPreTraining", objective, cfg, device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    grid, masks = objective.encoder.grid, objective.mask

    def forward(video: Tensor, number: int) -> Tensor:
        (mask,) = masks(video, grid, draws(video, number))
        hidden = torch.ones(len(video), grid.n, dtype=torch.bool, device=video.device)
        hidden.scatter_(1, mask.context, False)
        return net(video.transpose(1, 2), bool_masked_pos=hidden).loss

    return Contender(forward, optimizer.step, net)


def encoder(objective: Objective) -> Contender:
    """Forward and backward through V-JEPA 2's encoder."""
    net = objective.eval_encoder.requires_grad_(True)
    return Contender(lambda video, number: net(video).square().mean(), lambda: None, net)


def their_encoder(objective: Objective, cfg: TrainConfig, device: str) -> Contender:
    net: Any = from_transformers("VJEPA2Model", objective, cfg, device).train()

    def forward(video: Tensor, number: int) -> Tensor:
        return net(video.transpose(1, 2), skip_predictor=True).last_hidden_state.square().mean()

    return Contender(forward, lambda: None, net.encoder)


def make(name: str, model: str, device: str, compiled: bool) -> tuple[Contender, Objective]:
    """One of PAIRS, and the objective whose weights it starts from."""
    width, depth, heads = DECODERS[model]
    if "VideoMAE" in name:
        decoder = [
            f"method.predictor.{k}={v}" for k, v in (("width", width), ("depth", depth), ("heads", heads))
        ]
        objective, cfg = build("videomae", model, device, *decoder)
    else:
        heads = MODELS[model].keywords["heads"]  # type: ignore[attr-defined]
        method = "vjepa" if name in PAIRS[1] else "vjepa2"
        objective, cfg = build(method, model, device, f"method.predictor.heads={heads}")
    makers: dict[str, Callable[[], Contender]] = {
        "transformers VideoMAE": lambda: their_videomae(objective, cfg, device),
        "plain V-JEPA loop": lambda: plain_loop(objective),
        "vidssl V-JEPA 2 encoder": lambda: encoder(objective),
        "transformers VJEPA2Model": lambda: their_encoder(objective, cfg, device),
    }
    return makers.get(name, lambda: ours(objective, cfg, compiled))(), objective
