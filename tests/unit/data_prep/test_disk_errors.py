"""Full and read-only disks while pack writes."""

import errno
import os
from types import SimpleNamespace

import pytest

from data_prep import engine, workers
from data_prep.encode import EncodedSample
from data_prep.filters import Rejected
from data_prep.plan import ShardPlan
from data_prep.sources import SourceItem
from vidssl.core.errors import UserError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["tar", "lines", "rename"])
def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, number, where):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    if where == "tar":
        monkeypatch.setattr(engine.TarWriter, "write", fail)
    elif where == "lines":
        monkeypatch.setattr(engine, "write_lines", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    (tmp_path / "a.mp4").write_bytes(b"x")
    shard = ShardPlan(tmp_path / "out" / "shard-000000.tar", [SourceItem("a.mp4", {})])
    shard.tar.parent.mkdir()
    plan = SimpleNamespace(source=tmp_path, main_label_set=None, classes={})
    message = rf"shard-000000\.tar.*: cannot be written: {os.strerror(number)}"
    with pytest.raises(UserError, match=message) as e:
        engine.write_shard(shard, [[EncodedSample({"frames": 1})]], plan)
    assert "\n" not in str(e.value)
    assert not shard.is_finished() and not list(shard.tar.parent.glob("*.tmp"))


def test_a_source_file_that_vanishes_is_named(tmp_path):
    shard = ShardPlan(tmp_path / "shard-000000.tar", [SourceItem("gone.mp4", {})])
    plan = SimpleNamespace(source=tmp_path, main_label_set=None, classes={})
    with pytest.raises(UserError, match=r"gone\.mp4: cannot be read any more: No such file"):
        engine.write_shard(shard, [[EncodedSample({"frames": 1})]], plan)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE])
def test_a_full_disk_does_not_reject_the_file(number):
    def fill_the_disk(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=os.strerror(number)):
        workers.reject_on_error(fill_the_disk, None)


def test_a_file_that_cannot_be_read_is_rejected():
    def deny(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    assert workers.reject_on_error(deny, None) == Rejected("unreadable", "Permission denied")
