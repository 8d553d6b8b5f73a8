"""Attention of an attentive probe: where the query of its head looks in a clip."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.evaluation.probe_data import encoder_view
from vidssl.evaluation.report import encoder_facts, is_same_encoder
from vidssl.evaluation.saved_heads import SavedHead, load_saved_head
from vidssl.evaluation.views import View
from vidssl.pictures.features import heat_over
from vidssl.pretrained.external import open_encoder
from vidssl.pretrained.load import LoadedEncoder

BRIGHT = 3.0  # times an even attention, below which nothing is shown as bright


class OpenedProbe(NamedTuple):
    """An attentive head, its encoder, and the single clips that both see."""

    saved: SavedHead
    loaded: LoadedEncoder
    view: View


def open_probe(probe: Path, label: str | None = None, encoder: str | None = None) -> OpenedProbe:
    """Opens a probe's folder. encoder: where the evaluated encoder is now; None: where probe.json says.
    Raises UserError if it is another one, or the head has no attention over a clip."""
    saved, report = load_saved_head(probe, label)
    settings = report["config"]
    data = settings["data"]
    source = encoder or settings["encoder"]
    loaded = open_encoder(
        source,
        settings["probe"].get("seed", 0) if settings.get("random_init") else None,
        file=settings.get("encoder_file"),
        frames=data.get("frames"),
        size=data.get("size"),
    )
    if not is_same_encoder(report["encoder"], encoder_facts(loaded.encoder, loaded.metadata)):
        raise UserError(f"{source}: is not the encoder that {probe / 'probe.json'} evaluated")
    if settings["probe"].get("tokens", "patches") != "patches":
        raise UserError(f"{probe}: its head sees the class token, which has no place in a clip")
    view_options = {name: data.get(name) for name in ("frames", "size", "stride", "fps")}
    return OpenedProbe(saved, loaded, encoder_view(loaded, 1, 1, **view_options))


@torch.no_grad()
def query_attention(saved: SavedHead, features: Tensor) -> Tensor:
    """Attention f32 [n, heads, t, h, w] of the probe's query to the tokens of clips, f32 [n, t, h, w, D]; it
    sums to 1 over the tokens of a clip."""
    _, t, h, _, _ = features.shape
    tokens = saved.standardise(rearrange(features, "n t h w d -> n (t h w) d"))
    weights = saved.head.attention(tokens)
    return rearrange(weights, "n k (t h w) -> n k t h w", t=t, h=h)


def attention_video(video: np.ndarray, weights: Tensor) -> np.ndarray:
    """A video u8 [T, S, S, 3] with the attention f32 [heads, t, h, w] of a clip, the mean over heads, as
    colours: bright is the largest, but at least BRIGHT times an even attention."""
    values = reduce(weights, "k t h w -> t h w", "mean")
    return heat_over(video, values, max(float(values.max()), BRIGHT * float(values.mean())))


@torch.no_grad()
def predicted_class(saved: SavedHead, features: Tensor) -> str:
    """What the head predicts for clips f32 [n, t, h, w, D] of one video: a class and its probability."""
    tokens = saved.standardise(rearrange(features, "n t h w d -> n (t h w) d"))
    logits = saved.head(tokens)
    if saved.kind != "class":
        return ""
    probabilities = logits.softmax(-1).mean(0)
    best = int(probabilities.argmax())
    return f"{saved.names[best]} {100 * float(probabilities[best]):.0f} %"
