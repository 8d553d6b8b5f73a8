"""Self-supervised learning from video: masks, targets, predictors, and an honest frozen evaluation.

    encoder = vidssl.load_encoder("runs/mine")        # a run folder, or a published checkpoint
    features = encoder.embed("video.mp4")             # f32 [D], as a probe sees the video

    dataset = vidssl.open_dataset("runs/shards/train", batch=8, frames=16, size=224)
    objective = vidssl.make_objective("configs/method/vjepa.yaml", "model.kind=vit_small")
    losses = objective(next(iter(dataset)).video)     # for one's own loop

docs/python.md has all of it.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidssl.core.errors import UserError
    from vidssl.data.clip_stream import ClipStream, open_dataset
    from vidssl.evaluation.frozen_encoder import FrozenEncoder
    from vidssl.evaluation.frozen_encoder import load_frozen_encoder as load_encoder
    from vidssl.model.vit import Encoder
    from vidssl.training.own_loop import OwnLoopObjective, make_objective

__version__ = version("vidssl")
__all__ = [
    "ClipStream",
    "Encoder",
    "FrozenEncoder",
    "OwnLoopObjective",
    "UserError",
    "__version__",
    "load_encoder",
    "make_objective",
    "open_dataset",
]
# Public name -> (module, its name there), imported on first use, so that `import vidssl` stays fast
_PLACES = {
    "ClipStream": ("vidssl.data.clip_stream", "ClipStream"),
    "Encoder": ("vidssl.model.vit", "Encoder"),
    "FrozenEncoder": ("vidssl.evaluation.frozen_encoder", "FrozenEncoder"),
    "OwnLoopObjective": ("vidssl.training.own_loop", "OwnLoopObjective"),
    "UserError": ("vidssl.core.errors", "UserError"),
    "load_encoder": ("vidssl.evaluation.frozen_encoder", "load_frozen_encoder"),
    "make_objective": ("vidssl.training.own_loop", "make_objective"),
    "open_dataset": ("vidssl.data.clip_stream", "open_dataset"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'vidssl' has no attribute {name!r}")
    module, own_name = _PLACES[name]
    return getattr(import_module(module), own_name)


def __dir__() -> list[str]:
    return __all__
