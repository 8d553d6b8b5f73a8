"""A platform without a package of decord: a line where decord is asked for, and pack measures with PyAV."""

import sys

import pytest

from data_prep import pack
from vidssl.core.errors import UserError
from vidssl.data.decoding import check_decoder, open_video


@pytest.fixture
def without_decord(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    monkeypatch.delitem(sys.modules, "vidssl.data.decoding.decord", raising=False)
    monkeypatch.setattr(pack, "find_spec", lambda name: None)


def test_decord_is_missed_in_one_line(without_decord):
    meta = {"frames": 3, "decoder": "decord", "decord": True}
    for ask in (lambda: check_decoder("decord"), lambda: open_video(b"x", "mp4", meta)):
        with pytest.raises(UserError, match=r"decord cannot be loaded .*: pip install decord2") as raised:
            ask()
        assert "\n" not in str(raised.value)


def test_pack_measures_with_pyav_alone(without_decord, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no video or image"):
        pack.main([str(tmp_path / "empty"), str(tmp_path / "out")])
    assert "decord is not installed: files are measured with PyAV alone" in capsys.readouterr().err
