"""Sets one of the limits of vidssl/data/decoding in every module that reads it."""

import pytest

from vidssl.data import decoding
from vidssl.data.decoding import base, decord, image, pyav


def set_limit(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    for module in (base, pyav, image, decord, decoding):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
