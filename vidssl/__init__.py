"""Self-supervised learning from video: masks, targets, predictors, and an honest frozen evaluation.

import vidssl

encoder, metadata = vidssl.load_encoder("runs/mine")  # a run folder, or a published checkpoint
features = encoder(video)  # video f32 [B, 3, T, H, W], normalised; features f32 [B, N, D]
"""

from importlib.metadata import version
from typing import Any

__version__ = version("vidssl")
__all__ = ["Encoder", "__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that `import vidssl` stays fast."""
    if name == "load_encoder":
        from vidssl.pretrained.load import load_encoder

        return load_encoder
    if name == "Encoder":
        from vidssl.model.vit import Encoder

        return Encoder
    raise AttributeError(f"module 'vidssl' has no attribute {name!r}")
