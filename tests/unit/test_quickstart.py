"""What a quickstart plans and reads, without running it."""

import json
from pathlib import Path

import pytest

from vidssl.commands.quickstart import next_steps, parse_quickstart
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


def test_a_wrong_setting_names_its_option(tmp_path):
    with pytest.raises(UserError, match=r"^--set: .*run\.stepz"):
        parse_quickstart(["--out", str(tmp_path / "out"), "--set", "run.stepz=1"])
    assert not (tmp_path / "out").exists()
