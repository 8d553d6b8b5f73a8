"""data_prep.engine: a Ray cluster writes the same shards, also if it loses a node."""

import itertools
import sys
from pathlib import Path

import pytest
from packed_files import file_hashes

from data_prep import engine, pack
from data_prep.plan import make_plan
from vidssl.core.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_video) -> Path:
    root = tmp_path_factory.mktemp("engines") / "src"
    (root / "x").mkdir(parents=True)
    for i in range(12):
        (root / "x" / f"{i}.mp4").write_bytes(make_video(20 - i % 3))
    (root / "x" / "12.mp4").write_bytes(b"no video")
    return root


@pytest.fixture
def cluster():
    """A head without CPUs and two nodes of one CPU each, as processes of this machine."""
    ray = pytest.importorskip("ray", reason="the Ray engine needs: pip install 'vidssl[ray]'")
    from ray.cluster_utils import Cluster

    store = 80 << 20
    nodes = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": store, "include_dashboard": False},
    )
    nodes.workers = [nodes.add_node(num_cpus=1, object_store_memory=store) for _ in range(2)]
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


ARGS = ["--samples-per-shard", "1", "--fps", "5", "--short-side", "32"]


def test_bytes_after_loss_of_a_node(cluster, corpus, tmp_path, monkeypatch):
    import ray

    pack.main([str(corpus), str(tmp_path / "local"), "--workers", "2", *ARGS])
    out = tmp_path / "ray"
    kept: dict[Path, int] = {}
    get = ray.get
    finished = itertools.count(1)

    def get_and_lose_a_node(ref):
        get(ref)
        if next(finished) == 2:
            kept.update({p: p.stat().st_mtime_ns for p in out.glob("*.tar")})
            cluster.remove_node(cluster.workers[0], allow_graceful=False)  # its raylet is killed

    monkeypatch.setattr(ray, "get", get_and_lose_a_node)
    pack.main([str(corpus), str(out), "--engine", "ray", *ARGS])
    assert 2 <= len(kept) < 13
    assert file_hashes(out) == file_hashes(tmp_path / "local")
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # finished shards are not written again


def test_without_ray(monkeypatch, corpus, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed; pip install 'vidssl\[ray\]'"):
        pack.main([str(corpus), str(tmp_path / "out"), "--engine", "ray", *ARGS])


def test_source_is_not_visible_on_a_node(corpus, tmp_path):
    args = pack.parse_arguments([str(corpus), str(tmp_path / "out"), *ARGS])
    plan = make_plan(pack.read_source(corpus), corpus, tmp_path / "out", args)
    with pytest.raises(UserError, match=r"not there on node .*all nodes must see it"):
        engine.make_on_node(plan._replace(source=tmp_path / "elsewhere"), plan.shards()[0], 10.0)
