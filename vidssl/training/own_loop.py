"""A method for one's own training loop: `vidssl.make_objective`."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vidssl import config
from vidssl.core.errors import UserError
from vidssl.core.io import make_folder
from vidssl.core.pixels import normalise
from vidssl.data.clip_stream import this_process
from vidssl.data.loader import Batch
from vidssl.model.vit import Encoder
from vidssl.objective.masks import count_cut_groups
from vidssl.pretrained.init import save_run_encoder, to_checkpoint
from vidssl.training.micro_batches import PartMaker
from vidssl.training.schema import TrainConfig

# Values of what a method is not made of, and of clips where the configuration does not say them
DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"train": ["."], "frames": 16, "stride": 4},
    "augment": {"kind": "random_crop", "size": 224},
    "optim": {"lr": 1e-3},
    "run": {"out": ".", "steps": 1, "batch": 8},
}


class Place(NamedTuple):
    """A process among all."""

    rank: int
    world: int  # number of processes


class OwnLoopObjective(nn.Module):
    """The method of a configuration with fresh weights, as a module that maps clips to losses.

    encoder: what is trained; eval_encoder: what is evaluated (V-JEPA: its moving average). Call `update`
    after each step of the optimizer."""

    def __init__(self, cfg: TrainConfig):
        super().__init__()
        self.cfg = cfg
        self.objective = cfg.build_objective()
        # Forward passes, and clips of all processes, so far: masks and noise are drawn from their numbers
        self.steps = 0
        self.clips = 0

    @property
    def encoder(self) -> Encoder:
        return self.objective.encoder

    @property
    def eval_encoder(self) -> Encoder:
        return self.objective.eval_encoder

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.steps, self.clips, self.cfg.run.seed])

    def set_extra_state(self, state: Tensor) -> None:
        """Raises UserError for a state of another seed: its random numbers would not go on. States of earlier
        versions do not name it."""
        steps, clips, *seed = state.tolist()
        if seed not in ([], [self.cfg.run.seed]):
            raise UserError(
                f"make_objective: the state has run.seed {seed[0]}, this one {self.cfg.run.seed}: give the "
                "same, or load the weights alone by objective.objective"
            )
        self.steps, self.clips = steps, clips

    def forward(
        self, video: Tensor, position: Tensor | None = None, motion: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Clips u8 [B, 3, T, S, S], or f32 and normalised, to {"loss": scalar with gradients, and its parts}.

        position: i64 [B], on the host, of the clips in the training stream (of vidssl.open_dataset), which
        decides masks and noise; None: clips are numbered as they come. motion: of a batch with
        data.motion_vectors."""
        place = Place(*this_process())
        if position is None:
            position = self.clips + place.rank + place.world * torch.arange(len(video))
        cut_groups = partial(count_cut_groups, self.objective.mask)
        make_parts = PartMaker(self.objective, place, self.cfg.run.seed, cut_groups=cut_groups)
        total: dict[str, Any] = {}
        for part in make_parts(self.steps, [Batch(video, position, position, [], [], motion)]):
            clips = normalise(part.video) if part.video.dtype == torch.uint8 else part.video
            share = len(part.video) / len(video)
            for name, value in self.objective(clips, part.rng, part.masks).items():
                total[name] = total.get(name, 0.0) + value * share
        self.steps += 1
        self.clips += len(video) * place.world
        return total

    def update(self, progress: float = 0.0) -> None:
        """Moves averages of the encoder; call it after each step of the optimizer. progress: of the training,
        0 at the first step and 1 at the last, with which their momentum changes."""
        self.objective.update(progress)

    def save_encoder(self, folder: str | Path) -> None:
        """Writes encoder.safetensors for vidssl.load_encoder and for probes."""
        out = Path(folder)
        make_folder(out)
        state = self.objective.state_dict()
        found = to_checkpoint(self.objective, self.cfg.encoder_arguments(), self.cfg.method.predictor, state)
        metadata = {"config": config.to_tree(self.cfg), "step": self.steps}
        save_run_encoder(out, found, metadata, snapshot=False)


def make_objective(*items: str | Path) -> OwnLoopObjective:
    """Builds the objective that YAML files and "key=value" texts describe, as those of `vidssl train`.

    It needs the sections method and model; of others it reads data.frames and data.stride (or fps),
    augment.size and run.seed (defaults: 16 frames, stride 4, 224 pixels, seed 0). Raises UserError for a
    mistake in them."""
    tree: dict[str, Any] = config.merge([str(item) for item in items])[0]
    for section, values in DEFAULTS.items():
        given = tree.get(section, {})
        tree[section] = {**values, **given}
        if "fps" in given:
            tree[section].pop("stride")
    return OwnLoopObjective(config.from_tree(tree, TrainConfig, "make_objective"))
