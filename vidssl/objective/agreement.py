"""The second formula: views of a clip agree.

loss = weight * mean over pairs (a, b) of agreement( predictor(e_a), branch(view_b) )  +  aux( embeddings e )
e_a  = projector(pool(encoder(view_a, kept_a)))

A pair is an online view a and a target view b, another one. The branch is the trained network itself, the
same without gradients, or its exponential moving average. kept_a is the context of a mask of the first
formula. With data.windows = W, view v is cut from window v modulo W.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vidssl.config import Choice, Fraction, PositiveFloat, Spec
from vidssl.core.errors import UserError
from vidssl.core.precision import without_autocast
from vidssl.core.rng import KeyedRNG
from vidssl.model.vit import Encoder
from vidssl.objective.averages import average_of, update_averages
from vidssl.objective.embedding_aux import EmbeddingAux
from vidssl.objective.masks import needs_video
from vidssl.objective.objective import Masker, Masks, Objective
from vidssl.objective.pair_losses import PairLoss
from vidssl.objective.projector import Projector, Prototypes, build_projector
from vidssl.objective.schema import MASK_PARTS
from vidssl.objective.view_schema import EMBEDDING_AUX_PARTS, PAIR_PARTS, HeadConfig, ViewGroup
from vidssl.objective.views import cut_view

Pool = Literal["class", "mean"]
Branch = Literal["same", "detached", "ema"]


class MovingAverage(nn.Module):
    """Exponential moving averages of the encoder and of other modules, which get no gradients."""

    def __init__(self, encoder: Encoder, others: Sequence[nn.Module], momentum: tuple[float, float]):
        super().__init__()
        self.encoder = average_of(encoder)
        self.others = nn.ModuleList(map(average_of, others))
        self.momentum = momentum
        self._online = list(others)  # in a list, so that they are not registered as submodules

    @property
    def ema_encoder(self) -> Encoder:
        return self.encoder

    def update(self, encoder: Encoder, momentum: float) -> None:
        update_averages([self.encoder, *self.others], [encoder, *self._online], momentum)


class ViewAgreement(Objective):
    """Makes views of each clip and compares their embeddings."""

    takes_windows = True

    def __init__(
        self,
        encoder: Encoder,
        views: Sequence[ViewGroup],
        loss: PairLoss,
        projector: Projector,
        predictor: Projector,
        mask: Masker | None = None,
        aux: Sequence[tuple[str, EmbeddingAux]] = (),
        pool: Pool = "class",
        branch: Branch = "same",
        average: MovingAverage | None = None,
        prototypes: Prototypes | None = None,
        evaluates_average: bool = False,
        against_mean: bool = False,
        weight: float = 1.0,
    ):
        """views: one for each view; average: of encoder, projector and, unless they are shared, prototypes;
        aux: (name, part). The other arguments are those of `build_view_agreement`."""
        super().__init__()
        self.encoder = encoder
        self.views = list(views)
        self.loss = loss
        self.projector = projector
        self.predictor = predictor
        self.mask: Any = mask
        self.aux = list(aux)
        self.pool = pool
        self.trains_class_only = pool == "class"
        self.branch = branch
        self.average = average
        self.prototypes = prototypes
        self.evaluates_average = evaluates_average
        self.against_mean = against_mean
        self.weight = weight
        self.online = [i for i, view in enumerate(views) if view.role != "target"]
        self.targets = [i for i, view in enumerate(views) if view.role != "online"]
        self.masked = [i for i in self.online if views[i].masked and mask is not None]
        if against_mean:
            self.pairs = [(a, 0) for a in range(len(self.online))]
        else:
            self.pairs = [
                (a, b) for a, i in enumerate(self.online) for b, j in enumerate(self.targets) if i != j
            ]

    @property
    def couples_clips(self) -> bool:
        return bool(self.aux) or super().couples_clips

    @property
    def eval_encoder(self) -> Encoder:
        return self.average.encoder if self.average and self.evaluates_average else self.encoder

    @property
    def varying_parts(self) -> list[nn.Module]:
        return [self.encoder] if self.masked and getattr(self.mask, "counts_vary", True) else []

    def check_clip(self, frames: int, size: int) -> None:
        """Raises UserError if the views of clips of so many frames of size x size pixels cannot be encoded or
        masked."""
        (clip, *_) = self.windows_of(torch.zeros(1, 3, frames, size, size))
        for i, view in enumerate(self.views):
            side = view.size or size
            cut = clip.new_zeros(*clip.shape[:3], side, side)
            grid = self.encoder.grid_of(cut)
            if i in self.masked:
                masks = self.mask(cut, grid, KeyedRNG(0, 0, torch.zeros(1, dtype=torch.int64)))
                if len(masks) > 1:
                    raise UserError(
                        f"method.agree.mask: {len(masks)} masks of a view, of which one is needed"
                    )

    def draw_masks(self, shape: torch.Size, rng: KeyedRNG, motion: Tensor | None = None) -> Masks:
        if not self.masked or needs_video(self.mask):
            return None
        (clip, *_) = self.windows_of(torch.empty(shape, device="meta"))  # only its shape may be read
        sizes = [self.views[i].size or shape[-1] for i in self.masked]
        return self.make_masks([clip.new_empty(*clip.shape[:3], s, s) for s in sizes], rng)

    def make_masks(self, clips: Sequence[Tensor], rng: KeyedRNG) -> Masks:
        """Returns a mask for each of the views `clips`, of which only the contexts are used."""
        drawn = [self.mask(clip, self.encoder.grid_of(clip), rng)[0] for clip in clips]
        return [mask._replace(target=mask.target[:, :0], weight=None) for mask in drawn]

    def forward(self, video: Tensor, rng: KeyedRNG, masks: Masks = None) -> dict[str, Tensor]:
        masks = self.draw_masks(video.shape, rng) if masks is None else masks
        rng = rng.to(video.device)
        windows = self.windows_of(video)
        views = [cut_view(windows[i % len(windows)], view, rng, i) for i, view in enumerate(self.views)]
        if masks is None:
            masks = self.make_masks([views[i] for i in self.masked], rng)
        kept = {i: mask.context.to(video.device) for i, mask in zip(self.masked, masks, strict=True)}
        embeddings = self.projector(self.embed(self.encoder, views, self.online, kept, rng))
        pred = self.predictor(embeddings)
        target = self.other_branch(views, embeddings)
        if self.prototypes is not None:
            self.prototypes.is_frozen = rng.step < self.loss.freeze
            pred = self.prototypes(pred)
            target = self.target_cosines(target)
        if self.against_mean:
            target = target.mean(0, keepdim=True)
        with without_autocast(video.device):
            agreement = self.loss(pred.float(), target.float(), self.pairs, rng.step)
            parts = {"agreement": agreement}
            loss = self.weight * agreement
            for name, aux in self.aux:
                cosines = None if self.prototypes is None else pred.float()
                parts[name] = aux(embeddings.float(), cosines, rng)
                loss = loss + aux.weight * parts[name]
        return {"loss": loss, **parts}

    def embed(
        self,
        encoder: Encoder,
        views: Sequence[Tensor],
        chosen: Sequence[int],
        kept: dict[int, Tensor],
        rng: KeyedRNG | None,
    ) -> Tensor:
        """Returns the pooled features [V, B, D] of the chosen views; those of one size are encoded at once.

        kept: the tokens i64 [B, Nc] that are seen of a view; all of views that have none.
        """
        batches: dict[tuple[int, int], list[int]] = {}
        for i in chosen:
            seen = kept[i].shape[1] if i in kept else 0
            batches.setdefault((views[i].shape[-1], seen), []).append(i)
        found: dict[int, Tensor] = {}
        for members in batches.values():
            clips = torch.cat([views[i] for i in members])
            ids = torch.cat([kept[i] for i in members]) if members[0] in kept else None
            own = None if rng is None else rng.of_views(len(members))
            z = encoder(clips, ids, return_levels=True, rng=own)
            z = z[:, 0] if self.pool == "class" else z[:, int(encoder.class_token is not None) :].mean(1)
            found |= zip(members, z.chunk(len(members)), strict=True)
        return torch.stack([found[i] for i in chosen])

    def other_branch(self, views: Sequence[Tensor], embeddings: Tensor) -> Tensor:
        """Returns the embeddings [G, B, K] of the target views."""
        if self.branch == "ema":
            assert self.average is not None
            with torch.no_grad():
                features = self.embed(self.average.encoder, views, self.targets, {}, None)
                return self.average.others[0](features)
        target = torch.stack([embeddings[self.online.index(i)] for i in self.targets])
        return target.detach() if self.branch == "detached" else target

    def target_cosines(self, target: Tensor) -> Tensor:
        """Of the target embeddings with the prototypes, or with their moving average."""
        own = [] if self.average is None else list(self.average.others[1:])
        prototypes: Any = own[0] if own else self.prototypes
        with torch.set_grad_enabled(self.branch == "same" and torch.is_grad_enabled()):
            return prototypes(target)


def build_view_agreement(
    encoder: Encoder,
    *,
    views: tuple[ViewGroup, ...],
    agreement: Annotated[Spec, Choice(PAIR_PARTS)],
    aux: Annotated[tuple[Spec, ...], Choice(EMBEDDING_AUX_PARTS, is_list=True)],
    mask: Annotated[Spec, Choice(MASK_PARTS, is_optional=True)],
    pool: Pool = "class",
    projector: HeadConfig = HeadConfig(),
    predictor: HeadConfig = HeadConfig(),
    branch: Branch = "same",
    momentum: tuple[Fraction, Fraction] | None = None,
    evaluate: Literal["online", "ema"] = "online",
    against: Literal["others", "mean"] = "others",
    weight: PositiveFloat = 1.0,
    frozen_patches: bool = False,
) -> ViewAgreement:
    """views: groups of views; agreement: of a pair of views; aux: added to it; mask: its context is what the
    online encoder sees; pool: the clip's feature, the class token or the mean of all others; branch: that of
    the targets; momentum: of the moving average, at the first and the last step; evaluate: which encoder is;
    against: the targets are the other views, or the mean of all target views; weight: of the agreement;
    frozen_patches: the patch embedding stays as drawn (MoCo v3)."""
    each = [group for group in views for _ in range(group.count)]
    loss: PairLoss = agreement.build()
    width = encoder.feature_width
    head = build_projector(projector, width)
    if pool == "class" and encoder.class_token is None:
        raise UserError("method.agree.pool class needs model.class_token=true; or give pool: mean")
    check_views(each, loss, branch)
    prototypes = Prototypes(head.width, loss.prototypes) if loss.prototypes else None
    if frozen_patches:
        encoder.patch_embed.requires_grad_(False)
    averaged: list[nn.Module] = [head] if branch == "ema" else []
    averaged += [prototypes] if averaged and prototypes and not loss.shares_prototypes else []
    needs_average = branch == "ema" or evaluate == "ema"
    if needs_average != (momentum is not None):
        raise UserError("method.agree.momentum goes with branch or evaluate ema: give both or neither")
    return ViewAgreement(
        encoder,
        each,
        loss,
        head,
        build_projector(predictor, head.width),
        mask.build(),
        [(str(spec.kind), spec.build()) for spec in aux],
        pool,
        branch,
        None if momentum is None else MovingAverage(encoder, averaged, momentum),
        prototypes,
        evaluate == "ema",
        against == "mean",
        weight,
    )


def check_views(views: Sequence[ViewGroup], loss: PairLoss, branch: Branch) -> None:
    """Raises UserError if the views cannot be compared."""
    roles = [view.role for view in views]
    if len(views) < 2 or roles.count("online") == len(views) or roles.count("target") == len(views):
        raise UserError("method.agree.views: give two or more, one of them online and another one a target")
    if "target" in roles and branch != "ema":
        raise UserError(f"method.agree.views: role target needs branch ema, not {branch}")
    if loss.all_are_targets and set(roles) != {"both"}:
        raise UserError("method.agree.agreement.own_view: every view must have the role both")


AGREEMENTS: dict[str, Callable[..., Objective]] = {"views": build_view_agreement}
