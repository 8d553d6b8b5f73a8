"""Self-supervised learning from video: masks, targets, predictors, and an honest frozen probe."""

import torch  # noqa: F401  before decord, wherever it is imported: decord2 first makes torch's CPU BLAS crash

__version__ = "0.1.0"
