"""Targets that are features of frozen teachers, or of the trained encoder itself."""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.core.pixels import renormalise
from vidssl.model.vit import Encoder
from vidssl.objective.ema_target import FeatureNorm, normalise_features, without_class_token
from vidssl.objective.target_base import Target

FramesOfTeacher = Literal["together", "apart"]


class Teacher(Target):
    """Last features of a frozen, larger encoder: distillation (V-JEPA 2.1's ViT-B and ViT-L, SALT).

    The teacher is loaded from `path` at every start and is not part of the checkpoints. Its patch must equal
    the model's, and its tubelet, unless it sees frames apart.
    """

    def __init__(
        self,
        encoder: Encoder,
        teacher: Encoder,
        path: str,
        norm: FeatureNorm = "layer",
        frames: FramesOfTeacher = "together",
    ):
        """norm: see normalise_features (V-JEPA 2.1: layer; MVD: none; SIGMA: instance). frames: apart, an
        encoder of images sees the first frame of each tubelet by itself (MVD, SIGMA, UMT)."""
        super().__init__(teacher.dim)
        tubelet = 1 if frames == "apart" else encoder.tubelet
        if (teacher.tubelet, teacher.patch) != (tubelet, encoder.patch):
            raise UserError(
                f"method.target.path: the teacher's patches ({path}) are "
                f"{teacher.tubelet} x {teacher.patch} x {teacher.patch}, "
                f"the model's {tubelet} x {encoder.patch} x {encoder.patch}"
                f"{', of frames apart' if frames == 'apart' else ''}; they must be equal"
            )
        self._teacher = [teacher]  # in a list, so that it is not registered as a submodule
        self._path = path
        self.norm = norm
        self.stride = encoder.tubelet if frames == "apart" else None

    @property
    def teacher(self) -> Encoder:
        return self._teacher[0]

    def check_clip(self, frames: int, size: int) -> None:
        if frames == 1 and self.teacher.patch_embed_img is None and self.teacher.tubelet > 1:
            raise UserError(
                f"method.target.path: the teacher ({self._path}) has no image tokenizer, so it cannot see "
                "a stream of one frame; give another teacher, or streams of videos"
            )

    @torch.no_grad()
    def forward(self, video: Tensor) -> Tensor:
        self._teacher[0] = self._teacher[0].to(video.device)
        video = renormalise(video, self.teacher.pixels)
        if self.stride is None:
            features = self.teacher(video)
        else:
            frames = video[:, :, :: self.stride]
            features = self.teacher(rearrange(frames, "b c t h w -> (b t) c 1 h w"))
            features = rearrange(features, "(b t) n d -> b (t n) d", b=len(video))
        return normalise_features(features, self.width, self.norm)


class Teachers(Target):
    """The features of several teachers of one width side by side, for a predictor of as many parts.

    As MVD has it (arXiv 2212.04500): an image and a video teacher, each with a decoder and a loss of its own,
    summed; here their mean.
    """

    def __init__(
        self,
        encoder: Encoder,
        teachers: Sequence[Encoder],
        paths: tuple[str, ...],
        frames: tuple[FramesOfTeacher, ...] = ("apart", "together"),
        norm: FeatureNorm = "none",
    ):
        """paths: of the teachers; frames: what each of them sees, see Teacher; norm: of each one's
        features."""
        if len(paths) != len(frames) or len(paths) < 2:
            raise UserError(
                f"method.target: {len(paths)} paths and {len(frames)} entries of frames; give as many, at "
                "least two"
            )
        if len({teacher.dim for teacher in teachers}) > 1:
            widths = ", ".join(f"{path} {t.dim}" for path, t in zip(paths, teachers, strict=True))
            raise UserError(f"method.target.paths: the teachers differ in width ({widths}); it must be one")
        super().__init__(sum(teacher.dim for teacher in teachers))
        self.members = nn.ModuleList(
            Teacher(encoder, teacher, path, norm, kind)
            for teacher, path, kind in zip(teachers, paths, frames, strict=True)
        )

    def check_clip(self, frames: int, size: int) -> None:
        for member in self.members:
            assert isinstance(member, Teacher)
            member.check_clip(frames, size)

    def forward(self, video: Tensor) -> Tensor:
        return torch.cat([member(video) for member in self.members], -1)


class Own(Target):
    """The features that the trained encoder has of the whole clip, with gradients: no average of it, no
    teacher.

    Nothing but auxiliary losses keeps them from becoming all equal: give method.aux sigreg or
    variance_covariance.
    """

    has_gradients = True

    def __init__(self, encoder: Encoder):
        super().__init__(encoder.feature_width)
        self._online = [encoder]  # in a list, so that it is not registered a second time

    def forward(self, video: Tensor) -> Tensor:
        return without_class_token(self._online[0], self._online[0](video, return_levels=True))
