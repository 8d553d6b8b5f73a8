"""What a quickstart plans and reads, without running it."""

import json
from pathlib import Path

import pytest

from vidssl.commands.quickstart import next_steps, parse_quickstart, prepare_data
from vidssl.config import load_config
from vidssl.core.errors import UserError
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.quickstart.programs import METHOD_FILES, METHODS, quickstart_jobs
from vidssl.quickstart.progress import last_step
from vidssl.quickstart.results import accuracy_over_steps, add_times, result_table, summary
from vidssl.training.schema import TrainConfig
from vidssl.zoo.flops import step_flops


@pytest.fixture
def quick(tmp_path):
    return parse_quickstart(
        ["--out", str(tmp_path / "out"), "--set", "run.steps=9", "--set", "run.save_every=3"]
    )


def write_probe(folder: Path, *rows: tuple[str, str, float]) -> None:
    """rows: label, control, accuracy."""
    same = {"protocol": "attentive", "ci95": [0, 100], "n_test": 5, "chance": 10, "top5": 1}
    results = [{"label": label, "control": c, "accuracy": accuracy, **same} for label, c, accuracy in rows]
    folder.mkdir(parents=True)
    (folder / "probe.json").write_text(json.dumps({"results": results}))


def test_the_last_whole_row_of_a_log_counts(tmp_path):
    log = tmp_path / "log.jsonl"
    assert last_step(log) == 0
    log.write_text('{"step": 1')
    assert last_step(log) == 0
    log.write_text("".join(f'{{"step": {i}, "text": "{"x" * 90}"}}\n' for i in range(1, 100)) + '{"step": 1')
    assert last_step(log) == 99


def test_the_programs_are_those_of_valid_configurations(quick):
    jobs = quickstart_jobs(quick, "motion", threads=1)
    assert [job.name for job in jobs] == [
        *METHODS,
        *(f"probe {name}" for name in ("vjepa", "random_init", "vjepa@2")),
        *(f"probe {name}" for name in ("videomae", "videomae@3", "videomae@6")),
    ]
    # What needs the shorter training alone comes first
    assert [job.needs for job in jobs[2:]] == ["vjepa"] * 3 + ["videomae"] * 3
    for job in jobs:
        module, *arguments = job.command[3:]
        cfg = load_config(arguments, TrainConfig if module == "vidssl.train" else ProbeConfig)
        assert (cfg.run.out if module == "vidssl.train" else cfg.out) == str(job.folder)
        assert job.needs is None or job.needs in METHODS


def test_the_two_trainings_differ_in_method_and_length_alone(quick):
    commands = [set(job.command) for job in quickstart_jobs(quick, "motion", 1)[:2]]
    differing = {text for text in commands[0] ^ commands[1] if "run.out=" not in text}
    methods = {f"configs/method/{METHOD_FILES[method]}.yaml" for method in METHODS}
    # Steps and save_every of the first are those that were given for both
    assert differing == {*methods, "run.steps=4", "run.save_every=2"}


def test_the_two_trainings_cost_the_same(tmp_path):
    jobs = quickstart_jobs(parse_quickstart(["--out", str(tmp_path / "out")]), "motion", 1)[:2]
    flops = []
    for job in jobs:
        cfg = load_config(job.command[4:], TrainConfig)
        flops.append(cfg.run.steps * step_flops(cfg))
    assert flops[0] == pytest.approx(flops[1], rel=0.05)


def test_the_results_are_read_from_the_probes(quick):
    for i, name in enumerate((*METHODS, "random_init")):
        rows = [("motion", "none", 50.0 + i), ("motion", "shuffled", 20.0), ("colour", "none", 80.0)]
        write_probe(quick.probe(name), *rows, ("colour", "shuffled", 81.0))
    write_probe(quick.probe("videomae@3"), ("motion", "none", 51.0))
    rows = summary(quick)
    assert len(rows) == 12 and set(rows[0]) == {
        "encoder",
        "label",
        "protocol",
        "control",
        "accuracy",
        "ci95",
        "n_test",
        "chance",
    }
    lines = result_table(rows).splitlines()
    assert "52.0 [0.0, 100.0]" in lines[3] and "20.0" in lines[3] and "random_init" in lines[3]
    assert accuracy_over_steps(quick, "videomae", 9) == [(0, 52.0), (3, 51.0), (9, 50.0)]


def test_times_of_a_continued_call_are_added(tmp_path):
    add_times(tmp_path / "times.json", {"render": 1.26})
    add_times(tmp_path / "times.json", {"pack": 2})
    assert json.loads((tmp_path / "times.json").read_text()) == {"render": 1.3, "pack": 2}


def test_a_folder_has_its_own_output_and_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    quick = parse_quickstart(["films"])
    assert quick.out == tmp_path / "runs/quickstart_films" and quick.source == tmp_path / "films"
    assert "configs/data/folder.yaml" in quickstart_jobs(quick, "label", 1)[0].command
    assert "--from runs/quickstart_films/videomae --videos FOLDER" in next_steps(quick)
    with pytest.raises(UserError, match=r"^--out .*: lies inside films; choose a folder outside it$"):
        parse_quickstart(["films", "--out", "films/out"])


@pytest.mark.parametrize("option", ["--train", "--test", "--labelled"])
def test_numbers_of_rendered_videos(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    for number in ("0", "-3"):
        with pytest.raises(UserError, match=rf"^{option} {number}: must be 1 or more$"):
            parse_quickstart([option, number])
    with pytest.raises(UserError, match=rf"^{option}: is of rendered videos; films is taken whole$"):
        parse_quickstart(["films", option, "5"])


@pytest.mark.parametrize(
    "option, setting, line",
    [
        ("--set", "run.stepz=1", r"^--set: videomae: .*run\.stepz"),
        # what one of the two methods alone would refuse
        ("--set", "method.target.norm=patch", r"^--set: vjepa: .*method\.target\.norm"),
        ("--set", "method.target.layers=2", r"^--set: videomae: .*method\.target\.layers"),
        ("--set", "run.batch=7", r"^--set: videomae: .*run\.batch"),
        ("--set", "data.val=no/such", r"^--set: videomae: data\.val: no/such: no such folder"),
        # after which probes would not find what they read
        ("--set", "run.snapshots=false", r"^--set: videomae: run\.snapshots: the snapshots are probed"),
        ("--set", "run.out=x", r"^--set: videomae: run\.out: is decided by --out"),
        ("--probe", "probe.epoch=1", r"^--probe: .*probe\.epoch"),
        ("--probe", "out=x", r"^--probe: encoder and out: each probe has its own"),
        ("--probe", "encoder=tests", r"^--probe: encoder and out: each probe has its own"),
    ],
)
def test_a_wrong_setting_names_its_option(option, setting, line, tmp_path):
    with pytest.raises(UserError, match=line):
        parse_quickstart(["--out", str(tmp_path / "out"), option, setting])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("save_every, validate_every", [(100, 100), (101, 202), (7, 700)])
def test_both_trainings_can_measure_a_held_out_error(save_every, validate_every, tmp_path):
    lengths = [f"run.save_every={save_every}", f"run.validate_every={validate_every}", "data.val=tests"]
    quick = parse_quickstart(["--out", str(tmp_path / "out"), *(f"--set={item}" for item in lengths)])
    for job in quickstart_jobs(quick, "motion", 1)[:2]:
        run = load_config(job.command[4:], TrainConfig).run
        assert run.validate_every / run.save_every == validate_every / save_every


def folder_of(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def packed_by(monkeypatch, *names: str) -> list[list[str]]:
    """Lets pack write an empty index for each name. Returns its calls."""
    calls: list[list[str]] = []

    def pack(argv: list[str]) -> None:
        calls.append(argv)
        folder_of(Path(argv[1]), *(f"{name}/index.json" for name in names))

    monkeypatch.setattr("data_prep.pack.main", pack)
    return calls


@pytest.mark.parametrize(
    "splits, tested",
    [(("train", "val"), "val"), (("train", "val", "test"), "test"), (("training", "validation"), "val")],
)
def test_val_is_tested_on_where_there_is_no_test(splits, tested, tmp_path, monkeypatch):
    videos = folder_of(tmp_path / "v", *(f"{split}/{c}/1{c}.mp4" for split in splits for c in "ab"))
    quick = parse_quickstart([str(videos), "--out", str(tmp_path / "out")])
    packed_by(monkeypatch, "train", *{"val", tested})
    assert prepare_data(quick) == "label" and quick.test_shards == tmp_path / "out/shards" / tested
    probes = [job for job in quickstart_jobs(quick, "label", 1) if job.name.startswith("probe")]
    assert all(f"data.test={quick.test_shards}" in job.command for job in probes)


@pytest.mark.parametrize(
    "files, line",
    [
        (["train/a/1.mp4", "train/b/2.mp4"], "its splits are train; expected train and test"),
        (["val/a/1.mp4", "test/b/2.mp4"], "its splits are test, val; expected train and test"),
        (["train/1.mp4", "test/2.mp4"], "no labels, so nothing to probe"),
        (["train/a/1.mp4", "test/b/2.mp4"], "no class of 'label' is in both train and test"),
        (["1.mp4", "2.mp4"], "no labels, so nothing to probe"),
    ],
)
def test_what_cannot_be_tested_is_said_before_it_is_packed(files, line, tmp_path, monkeypatch):
    videos = folder_of(tmp_path / "v", *files)
    calls = packed_by(monkeypatch)
    with pytest.raises(UserError, match=line):
        prepare_data(parse_quickstart([str(videos), "--out", str(tmp_path / "out")]))
    assert not calls


def test_the_label_on_the_way_is_one_of_train_and_test(tmp_path, monkeypatch):
    videos = folder_of(tmp_path / "v", "1.mp4", "2.mp4")
    rows = ["path,label_verb,label_noun,split", "1.mp4,a,x,train", "2.mp4,,x,test"]
    (videos / "labels.csv").write_text("\n".join(rows))
    calls = packed_by(monkeypatch, "train", "test")
    assert prepare_data(parse_quickstart([str(videos), "--out", str(tmp_path / "out")])) == "noun"
    (videos / "labels.csv").write_text("\n".join([*rows[:2], "2.mp4,,,test"]))
    with pytest.raises(UserError, match="no label in both train and test, so nothing to probe"):
        prepare_data(parse_quickstart([str(videos), "--out", str(tmp_path / "other")]))
    assert len(calls) == 1


def test_a_pack_that_was_cut_off_between_its_splits_goes_on(tmp_path, monkeypatch):
    videos = folder_of(tmp_path / "v", "a/1.mp4", "b/2.mp4")
    quick = parse_quickstart([str(videos), "--out", str(tmp_path / "out")])
    folder_of(quick.shards("train"), "index.json")
    assert packed_by(monkeypatch, "test") == [] and prepare_data(quick) == "label"


def test_results_of_other_videos_are_not_taken_for_those_of_the_folder(make_video, tmp_path):
    """Another file, another label, another content, and another folder of the same name."""
    videos = folder_of(tmp_path / "v", "a/1.mp4", "a/2.mp4", "b/1.mp4", "b/2.mp4")
    elsewhere = folder_of(tmp_path / "elsewhere" / "v", "a/1.mp4", "c/1.mp4")
    for frames, file in enumerate(sorted(videos.glob("*/*.mp4")), 3):
        file.write_bytes(make_video(frames=frames))

    def call(folder: Path = videos) -> str:
        return prepare_data(parse_quickstart([str(folder), "--out", str(tmp_path / "out")]))

    assert call() == call() == "label"
    file = videos / "b" / "2.mp4"
    for place in ("a/3.mp4", "a/1.mp4"):
        file = file.rename(videos / place)
        with pytest.raises(UserError, match="holds a pack of other files"):
            call()
    with pytest.raises(UserError, match="holds a pack of other files"):
        call(elsewhere)


@pytest.mark.parametrize("options", [["--train", "7"], ["--labelled", "1"], ["--test", "2"]])
def test_a_rendered_corpus_is_of_the_numbers_that_were_given(options, tmp_path, monkeypatch):
    rows = ["path,label_motion,split", "1.mp4,a,train", "2.mp4,b,train", "3.mp4,,train", "4.mp4,b,test"]
    packed_by(monkeypatch, "train", "test")
    folder_of(tmp_path / "corpus", *(f"{i}.mp4" for i in range(1, 5)))
    (tmp_path / "corpus" / "labels.csv").write_text("\n".join(rows))
    same = ["--out", str(tmp_path), "--train", "3", "--test", "1", "--labelled", "2"]
    assert prepare_data(parse_quickstart(same)) == "motion"
    with pytest.raises(UserError, match=rf"^{options[0]} {options[1]}: .* was rendered with \d"):
        prepare_data(parse_quickstart([*same, *options]))
