"""pack and embed on a Ray cluster: the same bytes as in one process, also after the loss of a node."""

import builtins
import itertools
import os
import sys
from pathlib import Path

import pytest
from packed_files import file_hashes
from program_ends import sigterm

import vidssl
from data_prep import engine, pack
from data_prep.plan import make_plan
from vidssl.commands import embed
from vidssl.core.cluster import WorkerSize
from vidssl.core.errors import Preempted, UserError
from vidssl.evaluation.cluster_embedding import ClusterSettings, block_jobs, process_size

NICENESS = "RAY_worker_niceness"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_video) -> Path:
    root = tmp_path_factory.mktemp("engines") / "src"
    (root / "x").mkdir(parents=True)
    for i in range(12):
        (root / "x" / f"{i}.mp4").write_bytes(make_video(20 - i % 3))
    (root / "x" / "12.mp4").write_bytes(b"no video")
    return root


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and two nodes of one CPU each, as processes of this machine. The last test loses
    one of them."""
    ray = pytest.importorskip("ray", reason="the Ray engine needs: pip install 'vidssl[ray]'")
    from ray.cluster_utils import Cluster

    # Ray replaces it by one that knows its progress bars
    own_print = builtins.print
    # Else whatever else the machine does goes before the workers
    os.environ[NICENESS] = "0"
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
    del os.environ[NICENESS]
    builtins.print = own_print


ARGS = ["--samples-per-shard", "1", "--fps", "5", "--short-side", "32"]


def test_an_embedding_is_that_of_one_process(cluster, corpus, tmp_path, monkeypatch):
    """SIGTERM comes when the first of three blocks is there; the same command computes the others."""
    import ray

    monkeypatch.chdir(corpus)
    files = ("configs/method/videomae_tiny.yaml", "configs/model/vit_micro.yaml")
    small = ("model.depth=1", "model.dim=32", "method.predictor.width=32", "data.frames=8", "data.stride=2")
    vidssl.make_objective(*files, *small, "augment.size=16", "model.tubelet=2").save_encoder(tmp_path / "run")
    windows = [
        "--window",
        "0.2",
        "--hop",
        "0.1",
        "--frames",
        "2",
        "--stride",
        "1",
        "--encoder",
        str(tmp_path / "run"),
    ]

    def call(out: str, *more: str) -> Path:
        embed.main(["x", "--out", str(tmp_path / out), *windows, *more])
        return tmp_path / out

    blocks = "parts/*/blocks/*.json"
    get = ray.get

    def get_and_end(ref):
        result = get(ref)
        if list((tmp_path / "ray").glob(blocks)):
            monkeypatch.setattr(ray, "get", get)
            sigterm()
        return result

    monkeypatch.setattr(ray, "get", get_and_end)
    with pytest.raises(Preempted):
        call("ray", "--engine", "ray", "--processes", "1")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "ray").glob(blocks)}
    assert 1 <= len(kept) < 4
    call("ray", "--engine", "ray", "--processes", "2")
    assert file_hashes(tmp_path / "ray") == file_hashes(call("one", "--workers", "0"))


def test_a_process_gets_what_its_node_has_for_it():
    """Of 32 CPUs and 8 GPUs: a GPU and 4 CPUs, one to encode and the others to decode."""
    nodes = [{"CPU": 64.0}, {"CPU": 32.0, "GPU": 8.0}]
    assert process_size(nodes, ClusterSettings(None, None, None)) == WorkerSize(4, 1)
    assert process_size(nodes, ClusterSettings(None, 0.5, None)) == WorkerSize(2, 0.5)
    assert process_size(nodes[:1], ClusterSettings(None, None, None)) == WorkerSize(1, 0)
    for none, wanted in (
        (nodes[:1], (None, 1.0, None)),
        (nodes, (None, 1.0, 40)),
        ([{}], (None, None, None)),
    ):
        with pytest.raises(UserError, match="no node of the cluster has"):
            process_size(none, ClusterSettings(*wanted))
    assert [job.blocks for job in block_jobs("s", [1, 2, 5, 6, 7], 2)] == [[1, 2, 5], [6, 7]]


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
    with pytest.raises(UserError, match="--gpus-per-process 1: from 0 to 1, and with --engine ray"):
        embed.main([str(corpus), "--encoder", "timm:x", "--out", "out", "--gpus-per-process", "1"])


def test_source_is_not_visible_on_a_node(corpus, tmp_path):
    args = pack.parse_arguments([str(corpus), str(tmp_path / "out"), *ARGS])
    plan = make_plan(pack.read_source(corpus), corpus, tmp_path / "out", args)
    with pytest.raises(UserError, match=r"not there on node .*all nodes must see it"):
        engine.shard_maker((plan._replace(source=tmp_path / "elsewhere"), 10.0))(plan.shards()[0])
