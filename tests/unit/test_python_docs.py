"""The snippets of docs/python.md and of the front page run, one after the other."""

import re
import shutil
from pathlib import Path

import pytest

import vidssl

ROOT = Path(__file__).parents[2]
MAKE = ("configs/method/videomae_tiny.yaml", "configs/model/vit_micro.yaml", "model.depth=1")
SIZES = ("data.frames=8", "data.stride=2", "augment.size=32")


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_corpus, tiny_shards):
    """What the page names: runs/mine, runs/shards/train, videos/a.mp4 and b.mp4."""
    vidssl.make_objective(*MAKE, *SIZES).save_encoder(tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "shards").mkdir()
    (tmp_path / "runs" / "shards" / "train").symlink_to(tiny_shards)
    (tmp_path / "videos").mkdir()
    for name, video in zip("ab", sorted(tiny_corpus.rglob("*.mp4"))[::5], strict=False):
        shutil.copy(video, tmp_path / "videos" / f"{name}.mp4")
    shutil.copy(tmp_path / "videos" / "a.mp4", tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_run(folder):
    names: dict = {}
    for code in snippets("docs/python.md"):
        exec(compile(code, "docs/python.md", "exec"), names)
    assert names["per_slice"].shape == (4, 128) and names["tokens"].shape == (4, 4, 4, 128)
    assert names["several"].shape == (2, 128) and names["features"].shape == (128,)
    assert len(names["rest"]) == 2 and names["rest"][0].position.tolist() == list(range(16, 24))
    exec(compile("".join(snippets("README.md")), "README.md", "exec"), names)
