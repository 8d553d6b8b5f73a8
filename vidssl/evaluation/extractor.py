"""From an encoder to the features of train and test under a control."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch
from accelerate import Accelerator
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.core.pixels import normalise
from vidssl.core.versions import version_of
from vidssl.data.dataset import do_nothing
from vidssl.data.shards import Sample, Shards
from vidssl.evaluation.controls import Control
from vidssl.evaluation.evaluate import check_readable
from vidssl.evaluation.feature_cache import FeatureShape, FeatureStore, check_disk
from vidssl.evaluation.features import (
    CACHE_DTYPES,
    Encode,
    FeatureLoader,
    Features,
    Location,
    choose_storage,
    compute_features,
)
from vidssl.evaluation.frozen_encoder import encode_tokens
from vidssl.evaluation.protocol import ProbeProtocol, Tokens, label_free_scores
from vidssl.evaluation.report import code_hash, weights_hash
from vidssl.evaluation.views import PatchMeans, View
from vidssl.pretrained.load import LoadedEncoder

OpenEncoder = Callable[[int | None], LoadedEncoder]  # of a seed: untrained; None: with its weights
FEATURE_CODE = (  # prefixes of modules; a change of their code computes features again
    *("core/pixels.py", "data/", "model/", "pretrained/"),
    *("evaluation/extractor.py", "evaluation/feature_cache.py", "evaluation/features.py"),
    "evaluation/frozen_encoder.py",
    *("evaluation/transfers.py", "evaluation/views.py"),
)
# Libraries that decode, resize, encode; a change of their version has the same effect.
FEATURE_LIBRARIES = (
    *("torch", "torchvision", "av", "decord", "decord2", "torchcodec", "pillow", "numpy", "einops"),
    *("timm", "transformers"),
)


class Split(NamedTuple):
    """Train or test."""

    shards: Shards
    samples: list[Sample]  # those with any of the labels


class FeatureExtractor(NamedTuple):
    """An encoder, and what identifies its features in a cache."""

    encode: Encode
    provenance: dict[str, Any]
    weight_bytes: int = 0  # of the encoder


def make_extractor(
    open_encoder: OpenEncoder,
    loaded: LoadedEncoder,
    control: Control,
    seed: int,
    accelerator: Accelerator,
    tokens: Tokens = "patches",
) -> FeatureExtractor:
    """The encoder, or its replacement under a control: untrained weights of `seed`, or mean colours of
    patches. tokens: of the encoder; the mean colours are those of all patches. Raises UserError if it has no
    such tokens."""
    model = loaded.metadata["model"]
    pixels = loaded.metadata["pixels"]
    statistics = (pixels["mean"], pixels["std"])
    arithmetic = {
        "device": accelerator.device.type,
        "float32_matmul": torch.get_float32_matmul_precision(),
    }
    if control == "pixels":
        means = PatchMeans(model["tubelet"], model["patch"])
        provenance = {
            "encoder": "patch means",
            "tubelet": means.tubelet,
            "patch": means.patch,
            "pixels": pixels,
            **arithmetic,
        }
        return FeatureExtractor(lambda video: means(normalise(video, statistics)), provenance)
    encoder = open_encoder(seed).encoder if control == "random_init" else loaded.encoder
    encoder.to(accelerator.device).requires_grad_(False)
    if tokens != "patches" and getattr(encoder, "class_token", None) is None:
        raise UserError(
            f"probe.tokens={tokens}: {model.get('name', 'this encoder')} has no class token that is read: "
            "give patches"
        )

    def encode(video: Tensor) -> Tensor:
        with accelerator.autocast():
            return encode_tokens(encoder, video, statistics, tokens)

    provenance = {
        "encoder": weights_hash(encoder),
        "model": model,
        "tokens": tokens,
        "precision": accelerator.mixed_precision,
        "pixels": pixels,
        **arithmetic,
    }
    return FeatureExtractor(encode, provenance, sum(p.nbytes for p in encoder.parameters()))


def cache_provenance(
    extractor: FeatureExtractor, view: View, data_hash: str, samples: Sequence[Sample]
) -> dict[str, Any]:
    """Everything that decides the features of samples; FeatureStore adds their shape and storage type."""
    # shards of other tools may repeat keys: labels decide which samples of a key are meant
    keys = "\n".join(f"{s.key} {s.shard} {s.offset}" for s in samples)
    return {
        **extractor.provenance,
        "view": view._asdict(),
        "data": data_hash,
        "samples": hashlib.sha256(keys.encode(errors="surrogateescape")).hexdigest(),
        "code": code_hash(*FEATURE_CODE),
        "libraries": {name: version_of(name) for name in FEATURE_LIBRARIES},
        # the FFmpeg that PyAV was built with or finds on this machine
        "ffmpeg": {name: list(version) for name, version in av.library_versions.items()},
    }


class FeaturePlan(NamedTuple):
    """Features of train and test under a control: what is computed, and where it is kept."""

    control: Control
    protocol: ProbeProtocol  # fitted to the features
    loaders: dict[str, FeatureLoader]  # of train and test
    shapes: dict[str, FeatureShape]
    stores: dict[str, FeatureStore]  # empty without a cache
    where: Location
    line: str  # for the log
    weight_bytes: int  # of the encoder


def plan_features(
    protocol: ProbeProtocol,
    extractor: FeatureExtractor,
    view: View,
    splits: dict[str, Split],
    accelerator: Accelerator,
    control: Control,
    encoder_heads: int | None,
    wait: Callable[[], None] = do_nothing,
    earlier: Sequence[FeaturePlan] = (),
) -> FeaturePlan:
    """Raises UserError if the features do not suit the protocol, or do not fit where they are kept, beside
    those of `earlier` plans. Decodes nothing. Collective. wait: see FeatureLoader."""
    loaders = {
        name: FeatureLoader(
            extractor.encode, *split, view, accelerator, protocol, f"features {name} ({control})", wait
        )
        for name, split in splits.items()
    }
    shape = loaders["train"].shape()
    protocol = protocol.fitted_to(shape.width, shape.tokens, encoder_heads)
    shapes = {name: shape._replace(samples=len(split.samples)) for name, split in splits.items()}
    stores: dict[str, FeatureStore] = {}
    if protocol.cache is not None:
        dtype = CACHE_DTYPES[protocol.cache_dtype]
        stores = {
            name: FeatureStore(
                Path(protocol.cache),
                cache_provenance(extractor, view, split.shards.hash, split.samples),
                shapes[name],
                dtype,
            )
            for name, split in splits.items()
        }
    planned = [store for plan in earlier if plan.where == "disk" for store in plan.stores.values()]

    def choose() -> tuple[Location, str]:
        own = list(stores.values())
        where, line = choose_storage(list(shapes.values()), protocol, accelerator.num_processes, own, planned)
        if where == "disk":
            check_disk(Path(str(protocol.cache)), [*planned, *own])
        return where, line

    # Others may write to the cache meanwhile: what one process sees holds for all.
    where, line = loaders["train"].processes.run_on_main(choose)
    return FeaturePlan(control, protocol, loaders, shapes, stores, where, line, extractor.weight_bytes)


def extract_features(plan: FeaturePlan) -> tuple[dict[str, Features], dict[str, float]]:
    """Returns the features of train and test as heads see them, and on the first process the label-free
    scores of train. Every process must call it."""
    protocol = plan.protocol
    features: dict[str, Features] = {}
    scores: dict[str, float] = {}
    for name, loader in plan.loaders.items():
        source, unreadable = compute_features(loader, plan.shapes[name], plan.where, plan.stores.get(name))
        check_readable(unreadable, loader.samples, protocol.allow_unreadable, name)
        indices = [index for index in range(len(loader.samples)) if index not in unreadable]
        prepared = protocol.prepare(source, indices, loader.device)
        features[name] = Features(prepared, unreadable)
        if name == "train":
            scores = label_free_scores(source, indices, protocol)
    return features, scores
