"""A representation of a whole video from the set of its clips' features: a transformer over frozen features,
trained on train without labels, evaluated by nearest neighbours.

Source: SCALE (Sameni et al. 2023, arXiv 2211.17042; main_scale.py): two sets of a video's clips agree, and a
quarter of the features is predicted from the others.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from timm.layers import Mlp
from torch import Tensor, nn

from vidssl.config import Fraction, PositiveFloat, PositiveInt
from vidssl.core.errors import UserError
from vidssl.core.progress import track
from vidssl.core.schedules import cosine
from vidssl.evaluation.features import TokenSource
from vidssl.evaluation.neighbours import KNN_TEMPERATURE, knn_predict
from vidssl.evaluation.protocol import (
    HyperparameterSettings,
    ProbeProtocol,
    TrainingSet,
    check_mean_pool,
    mean_pool,
)
from vidssl.evaluation.tasks import Task
from vidssl.model.vit import Block, TransformerStack, init_weights

SET_WIDTH = 256  # of the vectors that are compared between two sets
PLACE_NUMBERS = 2  # of a clip: its place in time and along the longer side of the frame, in [0, 1]


class ClipSetEncoder(nn.Module):
    """Features f32 [B, V, D] of clips at places f32 [B, V, 2] to a set token and clip tokens, [B, h] and
    [B, V, h]."""

    def __init__(self, features: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.place = Mlp(PLACE_NUMBERS, 2 * width, width)
        self.set_token = nn.Parameter(0.02 * torch.randn(width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = TransformerStack(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.set_head = Mlp(width, width, SET_WIDTH)
        self.clip_head = nn.Linear(width, features)
        init_weights(self, "xavier")

    def forward(self, x: Tensor, places: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden bool [B, V]: clips whose features are replaced by the mask token."""
        tokens = self.embed(x)
        if hidden is not None:
            tokens = torch.where(hidden[..., None], self.mask_token, tokens)
        tokens = torch.cat([self.set_token.expand(len(x), 1, -1), tokens + self.place(places)], 1)
        (tokens,) = self.blocks(tokens, None, [len(self.blocks) - 1])
        tokens = self.norm(tokens)
        return tokens[:, 0], tokens[:, 1:]


def set_loss(
    model: ClipSetEncoder, sets: Tensor, places: Tensor, hidden: Tensor, temperature: float
) -> Tensor:
    """Scalar: NCE between the two sets of each video, both ways, plus NCE of each hidden clip's prediction
    among the features of all clips of the batch.

    sets f32 [2, B, V, D], places f32 [2, B, V, 2], hidden bool [2, B, V], the same number in each set."""
    videos = sets.shape[1]
    tokens, clips = model(*(rearrange(t, "s b v ... -> (s b) v ...") for t in (sets, places, hidden)))
    a, b = F.normalize(model.set_head(tokens), dim=-1).split(videos)
    cosines = a @ b.T / temperature
    same = torch.arange(videos, device=sets.device)
    agreement = (F.cross_entropy(cosines, same) + F.cross_entropy(cosines.T, same)) / 2
    candidates = F.normalize(sets.flatten(0, 2), dim=-1)
    predicted = F.normalize(model.clip_head(clips), dim=-1).flatten(0, 1)
    right = torch.arange(len(candidates), device=sets.device)
    errors = F.cross_entropy(predicted @ candidates.T / temperature, right, reduction="none")
    weight = hidden.flatten().float()
    return agreement + (errors * weight).sum() / weight.sum()


class SetGallery(NamedTuple):
    """Train samples to search, and the encoder of their sets."""

    model: ClipSetEncoder
    features: Tensor  # f32 [n, h]
    targets: Tensor  # f32 [n, C]
    k: int


@dataclass(frozen=True, kw_only=True)
class ClipSet(ProbeProtocol):
    """Weighted k nearest neighbours on the set token of a video's clips (see the module). Compare with the
    kind knn on the same segments, which takes the mean of the clips."""

    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (
        1,
        5,
        10,
        20,
        50,
    )  # compared on held-out train
    temperature: PositiveFloat = KNN_TEMPERATURE
    width: PositiveInt = 512
    depth: PositiveInt = 2
    heads: PositiveInt = 16
    hidden: Annotated[Fraction, Field(gt=0)] = 0.25  # fraction of a set's clips that is predicted
    set_temperature: PositiveFloat = 0.2  # of both losses
    epochs: PositiveInt = 100
    batch: PositiveInt = 128  # videos
    lr: PositiveFloat = 1e-3  # falls to zero by a cosine
    weight_decay: PositiveFloat = 0.05

    def __post_init__(self) -> None:
        if self.segments * self.crops < 4:
            raise UserError(
                f"probe.segments {self.segments} x probe.crops {self.crops}: two sets of two need four clips"
            )
        if self.width % self.heads:
            raise UserError(f"probe.heads {self.heads} does not divide probe.width {self.width}")

    @property
    def examples_per_sample(self) -> int:
        return self.segments * self.crops

    def fitted_to(self, width: int, tokens: int, encoder_heads: int | None) -> Self:
        check_mean_pool(self, 1, tokens)
        return self

    def prepare(self, source: TokenSource, indices: list[int], device: torch.device) -> TokenSource:
        return mean_pool(source, indices, self, 1, device)

    def hyperparameters(self) -> HyperparameterSettings:
        return [{"k": k} for k in self.k]

    def clip_features(self, source: TokenSource, indices: list[int]) -> Tensor:
        """f32 [n, V, D]: the mean token of each clip."""
        (tokens,) = source.batches(1, [self.examples_of(indices)])
        return rearrange(tokens, "(n v) 1 d -> n v d", v=self.examples_per_sample)

    def places(self, device: torch.device) -> Tensor:
        """f32 [V, 2]: clips are numbered crop by crop, the segments of a crop in order (EvalClips)."""
        crops, segments = (torch.linspace(0, 1, n, device=device) for n in (self.crops, self.segments))
        return torch.stack(torch.meshgrid(segments, crops, indexing="ij"), -1).transpose(0, 1).flatten(0, 1)

    def train(self, task: Task, data: TrainingSet, settings: HyperparameterSettings) -> list[SetGallery]:
        """One encoder, trained without the labels; the settings share it."""
        x = self.clip_features(data.source, data.indices)
        model = self.train_encoder(x)
        features = self.set_features(model, x)
        targets = task.soft_targets(data.label_tensor)
        return [SetGallery(model, features, targets, setting["k"]) for setting in settings]

    def train_encoder(self, x: Tensor) -> ClipSetEncoder:
        """x f32 [n, V, D]."""
        generator = torch.Generator().manual_seed(self.seed)
        torch.manual_seed(self.seed)
        model = ClipSetEncoder(x.shape[-1], self.width, self.depth, self.heads).to(x.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), self.lr, (0.9, 0.95), weight_decay=self.weight_decay
        )
        batches = [
            b
            for _ in range(self.epochs)
            for b in torch.randperm(len(x), generator=generator).split(self.batch)
        ]
        places = self.places(x.device).expand(len(x), -1, -1)
        size = x.shape[1] // 2
        num_hidden = max(1, round(self.hidden * size))
        for step, batch in enumerate(track(batches, "sets of clips", "steps")):
            order = torch.rand(len(batch), x.shape[1], generator=generator).argsort(1)[:, : 2 * size]
            rows = batch[:, None]
            halves = [t[rows, order].unflatten(1, (2, size)).transpose(0, 1) for t in (x, places)]
            hidden = torch.rand(2, len(batch), size, generator=generator).argsort(-1) < num_hidden
            for group in optimizer.param_groups:
                group["lr"] = cosine(self.lr, 0.0, step / len(batches))
            optimizer.zero_grad()
            set_loss(model, halves[0], halves[1], hidden.to(x.device), self.set_temperature).backward()
            optimizer.step()
        return model.eval()

    @torch.no_grad()
    def set_features(self, model: ClipSetEncoder, x: Tensor) -> Tensor:
        """f32 [n, h]: the set token of all clips of each sample."""
        places = self.places(x.device)
        return torch.cat([model(part, places.expand(len(part), -1, -1))[0] for part in x.split(self.batch)])

    def predict(
        self, models: list[SetGallery], source: TokenSource, indices: list[int], task: Task
    ) -> Tensor:
        model, features, targets, _ = models[0]
        queries = self.set_features(model, self.clip_features(source, indices))
        return knn_predict(features, targets, queries, [m.k for m in models], self.temperature).cpu()
