"""Sets one of the limits of vidssl/data/decoding/base.py in every module that imports it."""

import pytest

from vidssl.data import decoding
from vidssl.data.decoding import base, video_stream


def set_limit(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    for module in (base, video_stream, decoding):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
