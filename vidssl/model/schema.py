"""Configuration of models, without torch."""

from vidssl.config.signatures import PartTable

MODEL_PARTS = PartTable("vidssl.model.vit", "MODELS")
NATIVE_SIZE_KEYS = ("frames", "height", "width")  # of the clip size on which the positions are defined
