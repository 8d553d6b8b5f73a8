"""What a pack that goes on says of its progress."""

from argparse import Namespace
from types import SimpleNamespace

import pytest

from data_prep import engine, packing
from data_prep.plan import ShardPlan
from data_prep.sources import SourceItem
from vidssl.core.progress import Progress


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_shards_of_an_earlier_run_are_no_work_of_this_one(finished, tmp_path, monkeypatch):
    """Else the remaining time would be far too short."""
    shards = [
        ShardPlan(tmp_path / f"shard-{i}.tar", [SourceItem(f"{i}-{n}.mp4", {}) for n in range(i + 2)])
        for i in range(2)
    ]
    for shard in shards[:finished]:
        for file in (shard.tar, shard.tar.with_suffix(".jsonl"), shard.rejections):
            file.touch()
    opened = []

    def progress(*args, **options) -> Progress:
        opened.append(Progress(*args, **options, quiet=True))
        return opened[0]

    made = []

    def make(plan, unfinished, workers, timeout, on_items) -> None:
        for shard in unfinished:
            made.append(shard)
            on_items(len(shard.items))

    monkeypatch.setattr(packing, "Progress", progress)
    monkeypatch.setattr(engine, "make_locally", make)
    plan = SimpleNamespace(shards=lambda: shards, datasets={tmp_path: shards})
    packing.write_shards(plan, Namespace(engine="local", workers=1, timeout=1.0))
    assert made == shards[finished:]
    assert (opened[0].first, opened[0].done) == ((0, 2, 5)[finished], 5)
