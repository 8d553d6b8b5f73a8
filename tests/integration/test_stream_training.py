"""Training with data.reader: stream, from tars that webdataset wrote and nobody indexed."""

import json
from pathlib import Path

import pytest
import webdataset
from programs import run_world

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pattern(tmp_path_factory, make_video) -> str:
    """Four tars of six videos."""
    folder = tmp_path_factory.mktemp("bucket")
    video = make_video(8)
    for s in range(4):
        with webdataset.TarWriter(str(folder / f"part-{s:03d}.tar"), encoder=False) as tar:
            for i in range(6):
                tar.write({"__key__": f"{s}-{i}", "mp4": video, "cls": b"0"})
    return str(folder / "part-{000..003}.tar")


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 2)])
def test_training_from_a_bucket_without_an_index(pattern, tmp_path, processes, workers):
    files = ["method/vjepa.yaml", "model/vit_micro.yaml", "data/quickstart.yaml", "run/smoke.yaml"]
    settings = [f"data.train={pattern}", "data.reader=stream", "data.frames=4", "data.stride=1"]
    settings += ["run.batch=8", "run.steps=3", f"efficiency.workers={workers}", f"run.out={tmp_path / 'run'}"]
    settings += ["method.predictor.width=96", "method.predictor.depth=1", "method.predictor.heads=4"]
    done = run_world(processes, "vidssl.train", *(str(ROOT / "configs" / f) for f in files), *settings)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("data.reader stream: 4 shards") == 1
    rows = [json.loads(row) for row in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
