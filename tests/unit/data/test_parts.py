"""Parts of packed data: folders that list some of the samples of a set."""

import numpy as np
import pytest

from vidssl.core.errors import UserError
from vidssl.data.format import Sample
from vidssl.data.parts import group_of, groups_of, hold_out, write_part
from vidssl.data.shards import Shards


def test_parts_hold_their_samples_and_no_others(synthetic_shards, tmp_path):
    source = str(synthetic_shards / "train")
    whole = Shards([source])
    samples = whole.list_samples()
    held_out = hold_out(samples, 0.2, seed=0).held_out
    write_part(source, held_out, tmp_path / "val")
    write_part(source, ~held_out, tmp_path / "train")
    parts = {name: Shards([str(tmp_path / name)]) for name in ("train", "val")}
    keys = {name: [s.key for s in part.list_samples()] for name, part in parts.items()}
    assert sorted(keys["train"] + keys["val"]) == sorted(s.key for s in samples)
    groups = {name: {group_of(s) for s in part.list_samples()} for name, part in parts.items()}
    assert not groups["train"] & groups["val"]
    assert parts["val"].classes == whole.classes and len({parts["val"].hash, whole.hash}) == 2
    for sample in parts["val"].list_samples()[:3]:
        (same,) = (s for s in samples if s.key == sample.key)
        assert parts["val"].read(sample) == whole.read(same)
    # a call that is repeated after a kill writes the same
    before = parts["val"].hash
    write_part(source, held_out, tmp_path / "val")
    assert Shards([str(tmp_path / "val")]).hash == before


def test_unrelated_samples_of_one_key_are_no_group():
    """Shards of other tools count their keys anew. The same sample in two folders is one, and groups stay."""
    samples = [Sample(f"{i}", "mp4", shard, 0, 100 * shard + i, {}) for shard in range(4) for i in range(4)]
    groups = groups_of(samples)
    assert len(set(groups)) == 16
    assert hold_out(samples, 0.1, seed=0).held_out.sum() == 2
    assert groups_of([*samples, *samples]) == groups * 2
    grouped = [s._replace(meta={"group": s.key}) for s in samples]
    assert groups_of(grouped) == [group_of(s) for s in grouped]
    assert groups_of(samples[:4]) == [group_of(s) for s in samples[:4]]


def test_an_empty_part_and_a_remote_one_are_refused(synthetic_shards, tmp_path):
    with pytest.raises(UserError, match="no sample would be in it"):
        write_part(str(synthetic_shards / "train"), np.zeros(60, bool), tmp_path / "none")
    with pytest.raises(UserError, match="local shards only"):
        write_part("https://host/train", np.ones(3, bool), tmp_path / "remote")
