"""The second formula: views of a clip agree.

loss = weight * mean over pairs (a, b) of agreement( predictor(e_a), branch(view_b) )  +  aux( embeddings e )
e_a  = projector(pool(encoder(view_a, kept_a)))

A pair is an online view a and a target view b, another one. The branch is the trained network itself, the
same without gradients, or its exponential moving average. kept_a is the context of a mask of the first
formula. With data.windows = W, view v is cut from window v modulo W. With method.agree.patches the encoder
sees hidden tokens, too, as a learned vector, and a loss of them is added (patch_agreement.py).
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vidssl.config import Choice, Fraction, PositiveFloat, Spec
from vidssl.core.errors import UserError
from vidssl.core.precision import without_autocast
from vidssl.core.rng import KeyedRNG
from vidssl.model.grid import Mask, gather_tokens
from vidssl.model.vit import Encoder
from vidssl.objective.averages import average_of, update_averages
from vidssl.objective.embedding_aux import EmbeddingAux
from vidssl.objective.masks import needs_video
from vidssl.objective.objective import Masker, Masks, Objective
from vidssl.objective.pair_losses import PairLoss
from vidssl.objective.patch_agreement import PatchAgreement, Replaced, build_patch_agreement
from vidssl.objective.projector import Projector, Prototypes, build_projector
from vidssl.objective.schema import MASK_PARTS
from vidssl.objective.view_schema import (
    EMBEDDING_AUX_PARTS,
    PAIR_PARTS,
    HeadConfig,
    PatchConfig,
    ViewGroup,
)
from vidssl.objective.views import cut_view, still

Pool = Literal["class", "mean"]
Branch = Literal["same", "detached", "ema"]
KINDS = ("context", "target")  # of the tokens of a mask


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
        patches: PatchAgreement | None = None,
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
        self.reads_class = pool == "class"
        self.trains_class_only = pool == "class" and patches is None
        self.patches = patches
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
        device = "cpu" if needs_video(self.mask) else "meta"
        (clip, *_) = self.windows_of(torch.zeros(1, 3, frames, size, size, device=device))
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        for i, view in enumerate(self.views):
            cut = self.blank_view(view, clip)
            grid = self.encoder.grid_of(cut)
            if i in self.masked:
                masks = self.mask(cut, grid, KeyedRNG(0, 0, first))
                if len(masks) > 1:
                    raise UserError(
                        f"method.agree.mask: {len(masks)} masks of a view, of which one is needed"
                    )

    def draw_masks(self, shape: torch.Size, rng: KeyedRNG, motion: Tensor | None = None) -> Masks:
        if not self.masked or needs_video(self.mask):
            return None
        (clip, *_) = self.windows_of(torch.empty(shape, device="meta"))  # only its shape may be read
        return self.make_masks([self.blank_view(self.views[i], clip) for i in self.masked], rng)

    def blank_view(self, view: ViewGroup, clip: Tensor) -> Tensor:
        """Zeros of the shape of a view of a clip [B, 3, T, H, W]."""
        frames = clip.shape[2] if view.frames == "all" else self.encoder.tubelet
        side = view.size or clip.shape[-1]
        return clip.new_zeros(*clip.shape[:2], frames, side, side)

    def make_masks(self, clips: Sequence[Tensor], rng: KeyedRNG) -> Masks:
        """Returns a mask for each of the views `clips`; without a loss of patches only the contexts are
        used."""
        drawn = [self.mask(clip, self.encoder.grid_of(clip), rng)[0] for clip in clips]
        if self.patches is not None:
            return drawn
        return [mask._replace(target=mask.target[:, :0], weight=None) for mask in drawn]

    def forward(self, video: Tensor, rng: KeyedRNG, masks: Masks = None) -> dict[str, Tensor]:
        masks = self.draw_masks(video.shape, rng) if masks is None else masks
        rng = rng.to(video.device)
        windows = self.windows_of(video)
        clips = [windows[i % len(windows)] for i in range(len(self.views))]
        frames = self.encoder.tubelet
        shown = [
            clip if view.frames == "all" else still(clip, frames, rng)
            for clip, view in zip(clips, self.views, strict=True)
        ]
        views = [cut_view(shown[i], view, rng, i) for i, view in enumerate(self.views)]
        if masks is None:
            masks = self.make_masks([views[i] for i in self.masked], rng)
        hidden = {i: mask.to(video.device) for i, mask in zip(self.masked, masks, strict=True)}
        tokens = self.encode(self.encoder, views, self.online, hidden, rng)
        embeddings = self.projector(self.pooled(tokens, self.online))
        pred = self.predictor(embeddings)
        target_tokens = self.averaged_tokens(views)
        target = self.other_branch(target_tokens, embeddings)
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
        if self.patches is not None:
            parts["patches"] = self.patch_loss(tokens, target_tokens, hidden, rng.step)
            loss = loss + self.patches.weight * parts["patches"]
        return {"loss": loss, **parts}

    def encode(
        self,
        encoder: Encoder,
        views: Sequence[Tensor],
        chosen: Sequence[int],
        hidden: dict[int, Mask],
        rng: KeyedRNG | None,
    ) -> dict[int, Tensor]:
        """Returns the tokens [B, (1 +) n, D] of the chosen views; those of one shape are encoded at once.

        hidden: the masks of views of which the encoder sees the context, or, with a loss of patches, a vector
        in place of the hidden ones; it sees all of views that have none.
        """
        batches: dict[tuple[torch.Size, int], list[int]] = {}
        for i in chosen:
            seen = hidden[i].context.shape[1] if i in hidden else 0
            batches.setdefault((views[i].shape[2:], seen), []).append(i)
        found: dict[int, Tensor] = {}
        for members in batches.values():
            clips = torch.cat([views[i] for i in members])
            ids: Tensor | None = None
            replaced: Replaced | None = None
            if members[0] in hidden:
                mask = Mask(*(torch.cat([getattr(hidden[i], name) for i in members]) for name in KINDS))
                if self.patches is None:
                    ids = mask.context
                else:
                    replaced = self.patches.replaced(mask, encoder.grid_of(clips))
            own = None if rng is None else rng.of_views(len(members))
            z = encoder(clips, ids, return_levels=True, rng=own, replaced=replaced)
            found |= zip(members, z.chunk(len(members)), strict=True)
        return found

    def pooled(self, tokens: dict[int, Tensor], chosen: Sequence[int]) -> Tensor:
        """The features [V, B, D] of the chosen views, of their tokens [B, (1 +) n, D]."""
        first = int(self.encoder.class_token is not None)
        features = [tokens[i][:, 0] if self.pool == "class" else tokens[i][:, first:].mean(1) for i in chosen]
        return torch.stack(features)

    @torch.no_grad()
    def averaged_tokens(self, views: Sequence[Tensor]) -> dict[int, Tensor]:
        """The tokens that the averaged branch, if there is one, has of the target views."""
        if self.branch != "ema":
            return {}
        assert self.average is not None
        return self.encode(self.average.encoder, views, self.targets, {}, None)

    def other_branch(self, tokens: dict[int, Tensor], embeddings: Tensor) -> Tensor:
        """Returns the embeddings [G, B, K] of the target views. tokens: of averaged_tokens."""
        if self.branch == "ema":
            assert self.average is not None
            with torch.no_grad():
                return self.average.others[0](self.pooled(tokens, self.targets))
        target = torch.stack([embeddings[self.online.index(i)] for i in self.targets])
        return target.detach() if self.branch == "detached" else target

    def patch_loss(
        self,
        tokens: dict[int, Tensor],
        target_tokens: dict[int, Tensor],
        hidden: dict[int, Mask],
        step: int,
    ) -> Tensor:
        """Of the hidden patches of the masked views. tokens: of the trained and of the averaged encoder."""
        assert self.patches is not None and self.prototypes is not None and self.average is not None
        first = int(self.encoder.class_token is not None)
        cosines, targets = [], []
        for i, mask in hidden.items():
            own = gather_tokens(tokens[i][:, first:], mask.target.flatten(1))
            cosines.append(self.prototypes(self.predictor(self.projector(own))))
            with torch.no_grad():
                projected = self.average.others[0](target_tokens[i][:, first:])
            targets.append(self.target_cosines(projected))
        return self.patches(cosines, targets, list(hidden.values()), step)

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
    patches: PatchConfig | None = None,
) -> ViewAgreement:
    """Views of each clip are made and their embeddings compared.

    views: groups of views; agreement: of a pair of views; aux: added to it; mask: its context is what the
    online encoder sees; pool: the clip's feature, the class token or the mean of all others; branch: that of
    the targets; momentum: of the moving average, at the first and the last step; evaluate: which encoder is;
    against: the targets are the other views, or the mean of all target views; weight: of the agreement;
    frozen_patches: the patch embedding stays as drawn (MoCo v3); patches: a loss of hidden patches (iBOT).
    """
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
    second = build_projector(predictor, head.width)
    of_patches = None
    if patches is not None:
        of_patches = build_patch_agreement(
            patches, encoder, each, loss, (head, second), branch, not mask.is_absent
        )
    return ViewAgreement(
        encoder,
        each,
        loss,
        head,
        second,
        mask.build(),
        [(str(spec.kind), spec.build()) for spec in aux],
        pool,
        branch,
        None if momentum is None else MovingAverage(encoder, averaged, momentum),
        prototypes,
        evaluate == "ema",
        against == "mean",
        weight,
        of_patches,
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
