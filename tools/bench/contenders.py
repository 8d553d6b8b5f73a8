"""Training steps that bench_step.py compares: this project's, transformers', the published V-JEPA loop."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.plain_vjepa import PlainLoop
from vidssl.config import load_config
from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import MODELS, Attention
from vidssl.objective.objective import Objective
from vidssl.pretrained.export_hf import save_hf
from vidssl.pretrained.init import to_checkpoint
from vidssl.training.blocks import configure_blocks
from vidssl.training.optim import build_optimizer
from vidssl.training.schema import TrainConfig

ROOT = Path(__file__).parents[2]
DECODERS = {
    "vit_small": (192, 4, 3),
    "vit_base": (384, 4, 6),
    "vit_large": (512, 12, 8),
    "vit_huge": (640, 12, 8),
}  # VideoMAE: width, depth, heads
PAIRS = {
    "videomae": ("vidssl VideoMAE", "transformers VideoMAE"),
    "vjepa": ("vidssl V-JEPA", "plain V-JEPA loop"),
    "vjepa2": ("vidssl V-JEPA 2 encoder", "transformers VJEPA2Model"),
}
COMPILED = ", compiled"  # at the end of a contender's name
MOMENTUM = 0.999


class Contender(NamedTuple):
    """A training step that can be timed."""

    forward: Callable[[Tensor, int], Tensor]  # (video, number of the step) -> loss
    finish: Callable[[], None]  # after the backward pass
    model: nn.Module  # the module that is trained
    bf16: bool = False

    def loss(self, video: Tensor, number: int) -> Tensor:
        """Returns the loss; with bf16, weights are cast anew in every step, as in training."""
        with torch.autocast(video.device.type, torch.bfloat16, enabled=self.bf16):
            return self.forward(video, number)

    def step(self, video: Tensor, number: int) -> None:
        self.model.zero_grad()
        self.loss(video, number).backward()
        self.finish()


def rng_of(video: Tensor, number: int) -> KeyedRNG:
    """Of a step's masks, which are drawn on the host, as in training."""
    return KeyedRNG(0, number, torch.arange(len(video)) + number * len(video))


def build(method: str, model: str, device: str, *options: str) -> tuple[Objective, TrainConfig]:
    """Returns the objective of a configuration in configs/, and the configuration."""
    files = [str(ROOT / f"configs/{name}.yaml") for name in (f"method/{method}", "data/clips_16x4")]
    given = [f"model.kind={model}", "data.train=x", "run.out=x", "run.steps=1000", "run.batch=1"]
    cfg = load_config([*files, *given, *options], TrainConfig)
    return cfg.build_objective().to(device), cfg


def ours(objective: Objective, cfg: TrainConfig, compiled: bool, with_cudnn: bool) -> Contender:
    """The step of train.py. with_cudnn: cuDNN's attention may be used where numbers of tokens vary, too."""
    objective = copy.deepcopy(objective)
    configure_blocks(objective, activation_checkpointing=False, compile=compiled)
    for layer in objective.modules() if with_cudnn else ():
        if isinstance(layer, Attention):
            layer.counts_vary = False
    optimizer = build_optimizer(objective, cfg.optim, fused=True)
    for part in objective.parts:
        part.momentum = (MOMENTUM, MOMENTUM)  # type: ignore[assignment]

    def finish() -> None:
        optimizer.step()
        objective.update(0.0)

    return Contender(lambda video, number: objective(video, rng_of(video, number))["loss"], finish, objective)


def plain_loop(objective: Objective) -> Contender:
    loop = PlainLoop(copy.deepcopy(objective))
    optimizer = torch.optim.AdamW([p for p in loop.parameters() if p.requires_grad], lr=1e-4)

    def finish() -> None:
        optimizer.step()
        loop.update(MOMENTUM)

    return Contender(lambda video, number: loop(video, rng_of(video, number)), finish, loop)


def from_transformers(kind: str, objective: Objective, cfg: TrainConfig, device: str) -> nn.Module:
    """Returns a model of transformers with the weights of `objective`."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        arguments = cfg.encoder_arguments()
        predictor = cfg.method.predictor
        save_hf(Path(folder), to_checkpoint(objective, arguments, predictor, objective.state_dict()))
        return getattr(transformers, kind).from_pretrained(folder, attn_implementation="sdpa").to(device)


def their_videomae(objective: Objective, cfg: TrainConfig, device: str) -> Contender:
    model = from_transformers("VideoMAEForPreTraining", objective, cfg, device).train()
    # On a GPU as transformers' Trainer has it.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda" or None)

    grid = objective.encoder.grid
    masks = objective.mask

    def forward(video: Tensor, number: int) -> Tensor:
        mask = masks(video, grid, rng_of(video, number))[0].to(video.device)
        hidden = torch.ones(len(video), grid.n, dtype=torch.bool, device=video.device)
        hidden.scatter_(1, mask.context, False)
        return model(video.transpose(1, 2), bool_masked_pos=hidden).loss

    return Contender(forward, optimizer.step, model)


def encoder(objective: Objective, compiled: bool) -> Contender:
    """Forward and backward through V-JEPA 2's encoder."""
    model = objective.eval_encoder.requires_grad_(True)
    configure_blocks(model, activation_checkpointing=False, compile=compiled)
    return Contender(lambda video, number: model(video).square().mean(), lambda: None, model)


def their_encoder(objective: Objective, cfg: TrainConfig, device: str) -> Contender:
    model: Any = from_transformers("VJEPA2Model", objective, cfg, device).train()

    def forward(video: Tensor, number: int) -> Tensor:
        return model(video.transpose(1, 2), skip_predictor=True).last_hidden_state.square().mean()

    return Contender(forward, lambda: None, model.encoder)


def make(name: str, model: str, device: str, with_cudnn: bool) -> tuple[Contender, Objective]:
    """Returns a contender named in PAIRS, or such a one COMPILED, and the objective whose weights it starts
    from. with_cudnn: see `ours`."""
    compiled = name.endswith(COMPILED)
    name = name.removesuffix(COMPILED)
    width, depth, heads = DECODERS[model]
    if "VideoMAE" in name:
        decoder = [
            f"method.predictor.{k}={v}" for k, v in (("width", width), ("depth", depth), ("heads", heads))
        ]
        objective, cfg = build("videomae", model, device, *decoder)
    else:
        heads = MODELS[model].keywords["heads"]  # type: ignore[attr-defined]
        method = "vjepa" if name in PAIRS["vjepa"] else "vjepa2"
        objective, cfg = build(method, model, device, f"method.predictor.heads={heads}")
    makers: dict[str, Callable[[], Contender]] = {
        "transformers VideoMAE": lambda: their_videomae(objective, cfg, device),
        "plain V-JEPA loop": lambda: plain_loop(objective),
        "vidssl V-JEPA 2 encoder": lambda: encoder(objective, compiled),
        "transformers VJEPA2Model": lambda: their_encoder(objective, cfg, device),
    }
    return makers.get(name, lambda: ours(objective, cfg, compiled, with_cudnn))(), objective
