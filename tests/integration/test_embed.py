"""vidssl embed and vidssl search: rows of shards and files, equal to a probe's features, on any number of
processes and after an early end."""

import csv
import io
import json
import os
import shutil
import tarfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forked_world import fork_world, set_rank
from PIL import Image, ImageColor
from program_ends import sigterm

import vidssl
from data_prep import scan
from vidssl.commands import embed, search
from vidssl.core.errors import Preempted
from vidssl.data.decoding import open_video
from vidssl.data.shards import Shards
from vidssl.evaluation.embedding import WHOLE, window_spans
from vidssl.evaluation.embedding_files import read_embedding
from vidssl.evaluation.extractor import make_extractor
from vidssl.evaluation.feature_cache import FeatureStore
from vidssl.evaluation.features import FeatureLoader, FeatureStorage, compute_features
from vidssl.evaluation.probe_data import encoder_view
from vidssl.pictures import montage
from vidssl.pretrained.files import load_weights, save_weights
from vidssl.pretrained.load import load_encoder

WINDOWS = ("--window", "0.4", "--hop", "0.1", "--stride", "1")  # 4 frames of 10 a second: a clip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """An untrained encoder of clips of 4 frames, every second, of 16 px."""
    out = tmp_path_factory.mktemp("embed") / "run"
    files = ("configs/method/videomae_tiny.yaml", "configs/model/vit_micro.yaml")
    small = ("model.depth=1", "model.dim=32", "method.predictor.width=32", "data.frames=8", "data.stride=2")
    vidssl.make_objective(*files, *small, "augment.size=16", "model.tubelet=2").save_encoder(out)
    return out


def call(run: Path, out: Path, *inputs: Path, more: tuple[str, ...] = ()) -> list[str]:
    given = [*map(str, inputs), "--encoder", str(run), "--out", str(out), "--workers", "0", "--frames", "4"]
    return [*given, *more]


def rows(out: Path) -> list[tuple[str, float, float]]:
    with open(out / "rows.csv", newline="") as f:
        return [(row["key"], float(row["start"]), float(row["end"])) for row in csv.DictReader(f)]


def test_whole_videos_equal_the_cached_features_of_a_probe(run, tiny_shards, tmp_path):
    """In f32 bit for bit, in all tokens; the fp16 means to the rounding of fp16."""
    embed.main(call(run, tmp_path / "dense", tiny_shards, more=("--tokens", "dense", "--dtype", "fp32")))
    embed.main(call(run, tmp_path / "mean", tiny_shards))
    loaded = load_encoder(run)
    accelerator = Accelerator(cpu=True)
    extractor = make_extractor(lambda seed: loaded, loaded, "none", 0, accelerator)
    shards = Shards([str(tiny_shards)])
    view = encoder_view(loaded, 1, 1, frames=4)
    samples = shards.list_samples()
    storage = FeatureStorage(workers=0)
    loader = FeatureLoader(extractor.encode, shards, samples, view, accelerator, storage, "probe")
    store = FeatureStore(tmp_path / "cache", {}, loader.shape(), torch.float32)
    tokens = compute_features(loader, loader.shape(), "disk", store).source.tokens
    dense = np.load(tmp_path / "dense" / "features.npy")
    assert dense.shape == (12, 2, 2, 2, 32) and dense.dtype == np.float32
    assert np.array_equal(dense.reshape(12, 1, 8, 32), tokens)
    mean = np.load(tmp_path / "mean" / "features.npy")
    assert np.array_equal(mean, tokens.mean((1, 2)).half())
    assert rows(tmp_path / "mean") == [(s.key, 0.0, s.meta["duration"]) for s in samples]


def test_windows_of_files_are_what_the_video_is_there(run, tiny_corpus, tmp_path):
    embed.main(call(run, tmp_path / "out", tiny_corpus / "run", more=(*WINDOWS, "--dtype", "fp32")))
    features = np.load(tmp_path / "out" / "features.npy")
    files = sorted(map(str, (tiny_corpus / "run").iterdir()))
    starts = [round(0.1 * i, 6) for i in range(16)]  # of 19 frames in 1.9 s
    assert rows(tmp_path / "out") == [(f, s, round(s + 0.4, 6)) for f in files for s in starts]
    encoder = vidssl.load_encoder(run, frames=4)
    with open_video(Path(files[0]).read_bytes(), "mp4") as video:
        frames = video.get(range(len(video)))
    expected = encoder.embed([frames[i : i + 4] for i in range(16)], stride=1)
    assert np.allclose(features[:16], expected, atol=1e-6)
    assert np.abs(features[1] - features[0]).max() > 1e-3


@pytest.mark.parametrize(
    "duration, expected",
    [
        (0.5, [WHOLE]),
        (2.0, [WHOLE]),
        (4.0, [(0.0, 2.0), (1.5, 3.5), (2.0, 4.0)]),
        (5.0, [(0.0, 2.0), (1.5, 3.5), (3.0, 5.0)]),
        (0.0, [WHOLE]),
    ],
)
def test_windows_cover_a_video(duration, expected):
    assert window_spans(duration, 2.0, 1.5) == expected


@pytest.mark.multiprocess
def test_neither_processes_nor_an_early_end_change_a_bit(run, tiny_shards, tmp_path, monkeypatch):
    """192 rows are four blocks: SIGTERM comes after the first."""
    arguments = call(run, tmp_path / "one", tiny_shards, more=WINDOWS)
    embed.main(arguments)

    def work(rank: int, port: int) -> None:
        set_rank(2, rank, port)
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        embed.main(call(run, tmp_path / "two", tiny_shards, more=WINDOWS))

    fork_world(2, work)
    is_valid = FeatureStore.is_valid
    write = FeatureStore.write
    written = []

    def write_one_block(store, some_rows):
        def until_the_second_block():
            for number, value in some_rows:
                written.append(number)
                if len(written) == 70:
                    sigterm()
                yield number, value

        write(store, until_the_second_block())

    monkeypatch.setattr(FeatureStore, "write", write_one_block)
    with pytest.raises(Preempted):
        embed.main(call(run, tmp_path / "ended", tiny_shards, more=WINDOWS))
    assert not (tmp_path / "ended" / "embedding.json").exists()
    embed.main(call(run, tmp_path / "ended", tiny_shards, more=WINDOWS))
    assert written[70:] == list(range(64, len(rows(tmp_path / "one"))))
    for other in ("two", "ended"):
        for name in ("features.npy", "rows.csv", "rejected.jsonl"):
            assert (tmp_path / other / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
        assert sorted(p.name for p in (tmp_path / other).iterdir()) == [
            *("embedding.json", "features.npy", "plan.json", "rejected.jsonl", "rows.csv"),
        ]
    monkeypatch.setattr(FeatureStore, "is_valid", is_valid)


def test_broken_files_are_listed_and_end_nothing(run, odd_corpus, tmp_path):
    # By itself, since a picture beside a video of its name is taken for its thumbnail
    picture = next(odd_corpus.rglob("text.png"))
    embed.main(call(run, tmp_path / "out", odd_corpus, picture, more=WINDOWS))
    found = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {Path(record["key"]).name: record["reason"] for record in found}
    assert set(reasons) == {"truncated.mp4", "text.mp4", "empty.mp4", "text.png"}
    assert reasons["empty.mp4"] == "empty" and reasons["text.png"] == "not_an_image"
    found = rows(tmp_path / "out")
    whole = {Path(key).name: end for key, start, end in found if start == 0.0}
    assert len(whole) == 9 and len(np.load(tmp_path / "out" / "features.npy")) == len(found) > 20
    assert whole["picture.png"] == 0.0 and whole["short.mp4"] == 0.2 and whole["vfr.mp4"] == 0.4
    with pytest.raises(vidssl.UserError, match="none of 3 files can be decoded"):
        embed.main(call(run, tmp_path / "none", odd_corpus / "bad"))


def test_names_that_are_not_utf_8(run, tiny_corpus, tmp_path, capsys):
    name = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(next(tiny_corpus.glob("*/*.mp4")), name)
    embed.main(call(run, tmp_path / "out", name))
    search.main([str(tmp_path / "out"), str(name), "--json"])
    assert read_embedding(tmp_path / "out").keys == [str(name)]


@pytest.mark.parametrize("fmt, package", [("parquet", "pyarrow"), ("zarr", "zarr")])
def test_other_formats_hold_the_same(fmt, package, run, tiny_shards, tmp_path):
    pytest.importorskip(package)
    for name in ("npy", fmt):
        embed.main(call(run, tmp_path / name, tiny_shards, more=("--format", name, "--tokens", "slices")))
    expected, found = (read_embedding(tmp_path / name) for name in ("npy", fmt))
    assert found.features.dtype == np.float16 and found.features.shape == (12, 2, 32)
    assert np.array_equal(found.features, expected.features) and found.keys == expected.keys


@pytest.fixture(scope="module")
def embedded(run, tiny_corpus, tmp_path_factory) -> Path:
    """All tiny videos, in windows of 0.8 s."""
    out = tmp_path_factory.mktemp("embedded") / "out"
    embed.main(call(run, out, tiny_corpus, more=("--window", "0.8", "--stride", "1")))
    return out


def test_search_finds_what_is_alike(embedded, tiny_corpus, tmp_path, capsys):
    """The videos of a corpus are the same frames: a key finds others at the same seconds, a file itself."""
    stored = read_embedding(embedded)
    key = stored.keys[0]
    montage = tmp_path / "hits.png"
    search.main([str(embedded), key, "--top", "3", "--json", "--montage", str(montage)])
    lines = capsys.readouterr().out.splitlines()
    hits = [json.loads(line) for line in lines[:3]]
    assert key not in [hit["key"] for hit in hits] and "the query and 3 hits" in lines[3]
    own = stored.features.astype(np.float32)
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    best = np.sort([v for k, v in zip(stored.keys, (own @ own[:3].T).max(1), strict=True) if k != key])[::-1]
    assert np.allclose([hit["similarity"] for hit in hits], best[:3], atol=1e-5)
    with Image.open(montage) as page:
        assert page.height == 4 * 148 + 4
        assert len(page.crop((0, 20, 530, 140)).getcolors(100_000)) > 5
    copy = tmp_path / "copy.mp4"
    shutil.copy(key, copy)
    search.main([str(embedded), str(copy), "--top", "2", "--centre"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def change_header(run: Path, out: Path, **changes) -> Path:
    """The encoder of a run with other entries in its header, and the same weights."""
    weights, header = load_weights(run / "encoder.safetensors")
    out.mkdir(exist_ok=True)
    parts = {part: {**header[part], **changes.get(part, {})} for part in ("model", "pixels")}
    save_weights(out / "encoder.safetensors", weights, {**header, **parts})
    return out


COLOURS = {"a": "red", "b": "green", "c": "blue"}


@pytest.fixture(scope="module")
def repeated(tmp_path_factory) -> tuple[Path, str]:
    """A folder of shards of others whose keys are 0 and 1 in each shard, of a colour each, and what scan
    says; 2 is in one of them."""
    folder = tmp_path_factory.mktemp("repeated")
    for shard, colour in COLOURS.items():
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for key in ("0", "1", "2") if shard == "a" else ("0", "1"):
                file = folder / "x.png"
                Image.new("RGB", (20, 20 + ord(shard) % 7), colour).save(file)
                tar.add(file, f"{key}.png")
                file.unlink()
    with redirect_stdout(io.StringIO()) as said:
        scan.main([str(folder)])
    return folder, said.getvalue()


def test_samples_whose_keys_repeat_are_told_apart(run, repeated, tmp_path, capsys, monkeypatch):
    folder, said = repeated
    assert "warning: 2 keys occur in several shards, such as 0;" in said
    out = tmp_path / "out"
    embed.main(call(run, out, folder))
    keys = [key for key, _, _ in rows(out)]
    assert keys == ["a/0", "a/1", "2", "b/0", "b/1", "c/0", "c/1"]
    strips = []
    monkeypatch.setattr(montage, "draw_montage", lambda drawn, path: strips.extend(drawn))
    capsys.readouterr()
    search.main([str(out), "b/0", "--top", "6", "--montage", str(tmp_path / "hits.png"), "--json"])
    hits = [json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()[:6]]
    assert sorted(hits) == sorted(set(keys) - {"b/0"})
    for key, strip in zip(["b/0", *hits], strips, strict=True):
        expected = ImageColor.getrgb(COLOURS[key[0] if "/" in key else "a"])
        assert strip.frames is not None and np.abs(strip.frames[0].mean((0, 1)) - expected).max() < 3
    with pytest.raises(vidssl.UserError, match=r"0: no key of .* \(keys: a/0, b/0, c/0\)"):
        search.main([str(out), "0"])
    # an embedding of an earlier version, which cannot say of which shard a row is
    (out / "rows.csv").write_text((out / "rows.csv").read_text().replace("b/0", "0"))
    with pytest.raises(vidssl.UserError, match="has no sample 0, or several in its shards: embed again"):
        search.main([str(out), "0", "--montage", str(tmp_path / "hits.png")])


def test_keys_that_repeat_in_shards_of_the_same_name(repeated, tiny_shards, tmp_path):
    shutil.copytree(repeated[0], tmp_path / "more")
    shards = Shards([str(repeated[0]), str(tmp_path / "more")])
    keys = [s.key for s in shards.list_named_samples()]
    assert len(set(keys)) == 14 and {"1/a/2", "2/a/2", "2/c/1"} < set(keys)
    own = Shards([str(tiny_shards)])
    assert own.list_named_samples() == own.list_samples()


OTHER_MODELS = {
    "heads": {"model": {"heads": 1}},
    "mean": {"pixels": {"mean": [0.1, 0.1, 0.1]}},
    "std": {"pixels": {"std": [0.5, 0.5, 0.5]}},
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_the_same_weights_in_another_model_are_another_encoder(other, run, tmp_path, capsys):
    """In DIR, with the query of a search, and in the key of what is already complete."""
    encoder = change_header(run, tmp_path / "encoder")
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (20, 20), "red").save(images / "a.png")
    query = tmp_path / "query.png"
    shutil.copy(images / "a.png", query)
    out = tmp_path / "out"
    embed.main(call(encoder, out, images))
    search.main([str(out), str(query)])
    earlier = json.loads((out / "plan.json").read_text())
    (out / "plan.json").write_text(json.dumps({**earlier, "encoder": earlier["encoder"]["sha256"]}))
    facts = json.loads((out / "embedding.json").read_text())
    embed.main(call(encoder, out, images))
    assert "already complete" in capsys.readouterr().out
    (out / "plan.json").write_text(json.dumps(earlier))
    change_header(run, encoder, **OTHER_MODELS[other])
    with pytest.raises(vidssl.UserError, match="another encoder or other options"):
        embed.main(call(encoder, out, images))
    with pytest.raises(vidssl.UserError, match="is another encoder now than that of"):
        search.main([str(out), str(query)])
    # an embedding of an earlier version holds only the hash of the weights
    del facts["encoder"]["model"], facts["encoder"]["pixels"]
    (out / "embedding.json").write_text(json.dumps(facts))
    search.main([str(out), str(query)])


def test_mistakes_are_one_line(run, tiny_corpus, tiny_shards, embedded, tmp_path):
    out = tmp_path / "out"
    cases = [
        (embed, call(run, out, tmp_path / "nowhere"), "nowhere: no such file or folder"),
        (embed, call(tmp_path / "no", out, tiny_corpus), "--encoder: .*no: no such file"),
        (embed, call(run, out, tiny_corpus, more=("--hop", "1")), "--hop: .* give --window"),
        (embed, call(run, out, tiny_corpus, more=("--window", "0")), "--window 0: must be positive"),
        (embed, call(run, out, tiny_corpus, tiny_shards), "give videos or shards, not both"),
        (embed, call(run, out, tiny_corpus, more=("--tokens", "class")), "no class token"),
        (embed, call(run, out, tiny_corpus, more=("--frames", "3")), "multiple of the encoder's tubelet"),
        (embed, call(run, embedded, tiny_shards), "holds features of other videos, another encoder"),
        (embed, call(run, tiny_corpus, tiny_shards), "holds something else already"),
        (search, [str(tmp_path), "x"], "no finished output of vidssl embed"),
        (search, [str(embedded), "x"], "x: no key of .*, and no such file"),
        (search, [str(embedded), "x", "--montage", "a.txt"], "give a .png or .jpg"),
    ]
    for program, arguments, message in cases:
        with pytest.raises(vidssl.UserError, match=message):
            program.main(arguments)
    assert not out.exists()


def test_a_missing_package_is_named(run, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(vidssl.UserError, match=r"pyarrow is not installed; pip install 'vidssl\[parquet\]'"):
        embed.main(call(run, tmp_path / "out", tiny_corpus, more=("--format", "parquet")))
