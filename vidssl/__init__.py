"""Self-supervised learning from video: masks, targets, predictors, and an honest frozen probe."""

__version__ = "0.1.0"
