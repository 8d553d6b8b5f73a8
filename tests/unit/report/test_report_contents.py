"""What a report says of a run follows from the run's files, also where they are damaged, cut or not there."""

import json

import pytest
import yaml
from report_runs import HOSTILE, STEPS, log_rows, make_probe, make_run, write_log

from vidssl.core.errors import UserError
from vidssl.report.contents import make_contents
from vidssl.report.curves import columns_by_panel, curves_of
from vidssl.report.page import embedded_json


def run_of(folder, *more):
    return make_contents([folder, *more], ["vidssl", "report"])["runs"][0]


def verdict(run, word):
    (found,) = [v for v in run["verdicts"] if word in v["question"]]
    return found


def test_curves_hold_the_rows_of_the_log(tmp_path):
    run = run_of(make_run(tmp_path / "a"))
    curves = run["curves"]
    loss = curves["columns"]["loss"]
    assert curves["x"][loss["x"]] == list(range(1, STEPS + 1))
    assert loss["y"] == pytest.approx([1 / s for s in range(1, STEPS + 1)], rel=1e-5)
    assert curves["x"][curves["columns"]["feature_rank"]["x"]] == list(range(5, STEPS + 1, 5))
    assert curves["flops"]["y"][-1] == STEPS * 1e9
    assert "samples_hash" not in curves["columns"] and "skip_reason" not in curves["columns"]


def test_a_long_log_is_thinned_to_means_and_extremes():
    rows = [{"step": i + 1, "loss": float(i), "lr": 1.0} for i in range(12_000)]
    curves = curves_of(rows)
    loss = curves["columns"]["loss"]
    assert len(loss["y"]) == 1200 and loss["mean_of"] == 10
    assert (loss["low"][0], loss["y"][0], loss["high"][0]) == (0, 4.5, 9)
    assert curves["x"][loss["x"]][-1] == 12_000 and "low" not in curves["columns"]["lr"]
    assert len(curves_of(rows, runs=60)["columns"]["loss"]["y"]) == 200


def test_columns_that_no_chart_knows_are_drawn_with_others():
    found = columns_by_panel([{"step": 1, "loss": 1.0, "loss_1": 1.0, "loss_0": 2.0, "strange thing": 3.0}])
    assert found == {"Loss": ["loss"], "Parts of the loss": ["loss_1", "loss_0"], "Others": ["strange thing"]}


def test_a_healthy_run_without_a_probe(tmp_path):
    run = run_of(make_run(tmp_path / "a"))
    assert verdict(run, "learned")["answer"] == "The loss fell; no probe yet"
    assert verdict(run, "collapsed")["kind"] == "good" and run["collapse"] == []
    assert verdict(run, "untrained")["kind"] == "unknown"
    assert verdict(run, "data")["answer"] == "No" and verdict(run, "complete")["kind"] == "good"
    assert any("No probe of this run was found" in text for text in run["missing"])


def test_a_fine_tuning_is_judged_by_its_accuracy(tmp_path):
    run = make_run(tmp_path / "tuned")
    config = {"encoder": "runs/a", "tune": {"epochs": 2, "batch": 4}, "data": {"train": ["nowhere/train"]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    epochs = {20: {"epoch": 1}, 40: {"epoch": 2}}
    of_epoch = {"epoch_loss": 1.0, "held_out_accuracy": 70.0}
    rows = [{"step": i, "loss": 1 / i, **(of_epoch | epochs[i] if i in epochs else {})} for i in range(1, 41)]
    write_log(run, rows[:30])
    page = run_of(run)
    assert verdict(page, "classify")["kind"] == "unknown"
    assert verdict(page, "complete")["answer"] == "1 of 2 epochs, 30 steps"
    assert not any("probe" in text for text in page["missing"])

    write_log(run, rows)
    right = make_probe(tmp_path / "made", "runs/a", {"none": 27})
    report = json.loads((right / "probe.json").read_text())
    chosen = {"epoch": 2, "epochs": 2, "held_out_accuracy": 70.0, "n_held_out": 10}
    report["results"][0] |= {"protocol": "finetune", "chosen": chosen}
    (run / "probe.json").write_text(json.dumps(report))
    (right / "predictions.csv").rename(run / "predictions.csv")
    contents = make_contents([run], ["vidssl", "report"])
    page = contents["runs"][0]
    assert page["verdicts"][0]["answer"] == "90.0 % [85.0, 95.0]" and page["verdicts"][0]["kind"] == "good"
    assert "Epoch 2 of 2 was the best on held-out train (70.0 % of 10)." in page["verdicts"][0]["why"]
    assert verdict(page, "complete")["answer"] == "Yes, 2 epochs"
    assert [panel["title"] for panel in contents["panels"]] == ["Loss", "Accuracy on held-out train"]
    assert page["confusions"][0]["n"] == 30 and page["probes"][0]["value"] == 90.0


@pytest.mark.parametrize("wait, answer", [(0.05, "No"), (0.2, "In part"), (0.5, "Yes")])
def test_waiting_decides_whether_a_run_is_bound_by_its_data(tmp_path, wait, answer):
    assert verdict(run_of(make_run(tmp_path / "a", wait=wait)), "data")["answer"] == answer


def test_a_collapse_is_found_by_the_rule_of_training(tmp_path):
    run = run_of(make_run(tmp_path / "a", collapse_at=20))
    # two measurements in a row, at steps 20 and 25
    assert run["collapse"] == [(25, STEPS)]
    assert verdict(run, "collapsed")["answer"] == "Yes, from step 25 on"
    assert "clips are alike" in verdict(run, "collapsed")["why"]
    assert verdict(run, "learned")["answer"] == "No, its features have collapsed"


@pytest.mark.parametrize(
    "trained, untrained, answer, kind",
    [(28, 10, "Yes", "good"), (10, 28, "No, beaten on motion", "bad"), (20, 20, "Undecided", "warn")],
)
def test_a_run_is_compared_with_its_untrained_self(tmp_path, trained, untrained, answer, kind):
    folder = make_run(tmp_path / "runs" / "a")
    make_probe(
        tmp_path / "probes" / "x",
        "elsewhere/runs/a",
        {"none": trained, "random_init": untrained, "shuffled": 9},
    )
    run = run_of(folder)
    found = verdict(run, "untrained")
    assert (found["answer"], found["kind"]) == (answer, kind)
    difference = 100 * (trained - untrained) / 30
    assert f"{trained / 0.3:.1f} against {untrained / 0.3:.1f} ({difference:+.1f} [" in found["why"]
    assert verdict(run, "learned")["kind"] == kind
    assert verdict(run, "order")["answer"] == ("On motion" if trained > 12 else "No label shows it")
    assert [row["value"] for row in run["probes"]] == pytest.approx([trained / 0.3, 9 / 0.3, untrained / 0.3])
    assert (run["probes"][0]["low"], run["probes"][0]["high"]) == pytest.approx(
        (trained / 0.3 - 5, trained / 0.3 + 5)
    )


@pytest.mark.parametrize(
    "change", [{"data": {"test": "h"}}, {"data": {"train": "h"}}, {"config": {"probe": {"segments": 3}}}]
)
def test_figures_of_other_data_or_clips_are_not_compared(change, tmp_path):
    """The untrained encoder was probed on one of two data sets whose labels have the same name."""
    folder = make_run(tmp_path / "runs" / "a")
    make_probe(tmp_path / "probes" / "first", "runs/a", {"none": 12})
    easy = make_probe(tmp_path / "probes" / "second", "runs/a", {"none": 29})
    untrained = make_probe(tmp_path / "probes" / "third", "runs/a", {"none": 15})
    for path, changed in ((easy, change), (untrained, {})):
        report = json.loads((path / "probe.json").read_text()) | changed
        report["encoder"]["random_init"] = path is untrained
        (path / "probe.json").write_text(json.dumps(report))
    found = verdict(run_of(folder), "untrained")
    assert found["answer"] != "Yes" and "motion (first): 40.0 against 50.0" in found["why"]
    assert "96.7" not in found["why"]


def test_a_probe_of_another_run_is_not_taken(tmp_path):
    folder = make_run(tmp_path / "runs" / "a")
    make_probe(tmp_path / "probes" / "b", "runs/b", {"none": 20})
    make_probe(tmp_path / "probes" / "other_a", "others/a", {"none": 20})
    assert run_of(folder)["probes"] == []
    make_probe(tmp_path / "probes" / "a@20", "runs/a/snapshots/step-00000020.safetensors", {"none": 20})
    assert [row["step"] for row in run_of(folder)["probes"]] == [20]


def test_confusions_count_the_predictions(tmp_path):
    folder = make_run(tmp_path / "a")
    make_probe(folder / "probe", str(folder), {"none": 27, "shuffled": 3})
    (confusion,) = run_of(folder)["confusions"]
    assert confusion["names"] == sorted(confusion["names"]) and confusion["n"] == 30
    assert sum(map(sum, confusion["matrix"])) == 30
    assert sum(confusion["matrix"][i][i] for i in range(3)) == 27
    assert {(truth, n) for truth, _, n in confusion["pairs"]} == {("clap", 1), ("run", 1), (HOSTILE, 1)}


def test_a_run_that_is_still_writing_and_damaged_rows(tmp_path):
    folder = make_run(tmp_path / "a")
    rows = log_rows(30)
    write_log(folder, rows[:20], '{"loss": 1}\nnonsense\n[1]\n' + json.dumps(rows[20]) + '\n{"step": 22, "lo')
    run = run_of(folder)
    assert run["curves"]["rows"] == 21 and run["last"]["step"] == 21
    assert "3 lines of log.jsonl cannot be read and are left out." in run["missing"]
    assert verdict(run, "complete")["answer"] == "21 of 40 steps (52%)"


def test_rows_that_go_back_replace_those_from_there_on(tmp_path):
    folder = make_run(tmp_path / "a")
    write_log(folder, [*log_rows(10), {"step": 8, "loss": 7.0}])
    loss = run_of(folder)["curves"]["columns"]["loss"]
    assert len(loss["y"]) == 8 and loss["y"][-1] == 7


@pytest.mark.parametrize("damage", ["config", "log", "probe", "predictions", "values"])
def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path, damage):
    folder = make_run(tmp_path / "a")
    probe = make_probe(folder / "probe", str(folder), {"none": 27, "random_init": 3})
    if damage == "config":
        (folder / "config.yaml").write_text("run: {steps: [")
    elif damage == "log":
        (folder / "log.jsonl").unlink()
    elif damage == "probe":
        (probe / "probe.json").write_text('{"results": [')
    elif damage == "predictions":
        (probe / "predictions.csv").write_bytes(b"label,control\n\xff\xfe,x\n")
    else:
        report = json.loads((probe / "probe.json").read_text())
        report["results"][0] |= {"value": None, "ci95": "none", "n_test": float("nan"), "chance": "a"}
        (probe / "probe.json").write_text(json.dumps({**report, "encoder": 3, "trained": "x"}))
    contents = make_contents([folder], ["vidssl"])
    (run,) = contents["runs"]
    embedded_json(contents)
    named = {
        "config": "config.yaml",
        "log": "log.jsonl",
        "probe": "probe.json",
        "predictions": "predictions.csv",
    }
    assert damage == "values" or any(named[damage] in text for text in run["missing"])
    assert bool(run["probes"]) == (damage != "probe")


def test_several_runs_a_zoo_and_a_quickstart_are_expanded(tmp_path):
    first = make_run(tmp_path / "zoo" / "runs" / "a-seed0")
    second = make_run(tmp_path / "zoo" / "runs" / "b-seed0")
    head = "run,seed,step,clips,flops,probe,label,control,metric,train_fraction,accuracy,low,high,chance"
    rows = "a,0,40,160,4e10,linear,motion,none,top1,,50.0,40,60,33.3\n"
    (tmp_path / "zoo" / "results.csv").write_text(f"{head}\n{rows}")
    (tmp_path / "zoo" / "table.md").write_text(
        "# zoo\n\n## linear: motion\n\n| encoder | x |\n|---|---|\n| a | 5 |\n"
    )
    contents = make_contents([tmp_path / "zoo", first], ["vidssl"])
    assert [run["name"] for run in contents["runs"]] == ["a-seed0", "b-seed0"]
    (zoo,) = contents["zoos"]
    assert zoo["rows"][0]["accuracy"] == 50 and zoo["rows"][0]["run"] == "a"
    assert zoo["tables"] == [{"title": "linear: motion", "head": ["encoder", "x"], "rows": [["a", "5"]]}]
    contents = make_contents([second.parent], ["vidssl"])
    assert [run["name"] for run in contents["runs"]] == ["a-seed0", "b-seed0"]
    with pytest.raises(UserError, match="no such folder"):
        make_contents([tmp_path / "none"], ["vidssl"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run"):
        make_contents([tmp_path / "empty"], ["vidssl"])


def test_no_name_of_a_user_can_end_the_script(tmp_path):
    folder = make_run(tmp_path / "a")
    make_probe(folder / "probe", str(folder), {"none": 27})
    contents = make_contents([folder], ["vidssl"])
    text = embedded_json(contents)
    assert "<" not in text and json.loads(text)["runs"][0]["confusions"] == contents["runs"][0]["confusions"]
