"""The runner of tools/check_gpu.py: whatever a check does, the next one starts and the report is written."""

import json
import time

import check_gpu
import pytest
from check_gpu import Check, run_checks

FOREVER = "import time; time.sleep(600)"


def program(code: str, name: str = "x", needs_s: float = 0.0, limit_s: float = 60.0) -> Check:
    return Check(name, needs_s, limit_s, ["-c", code])


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        ("print('first'); print('two are equal')", "passed", "two are equal"),
        ("print('no GPU'); exit(77)", "skipped", "no GPU"),
        ("print('1 differs'); exit(1)", "failed", "1 differs"),
        ("raise ValueError('odd')", "failed", "ValueError: odd"),
        ("import os; os.kill(os.getpid(), 11)", "failed", "SIGSEGV: no output"),
        ("import os; os.write(1, bytes([255, 10])); os._exit(3)", "failed", "\ufffd"),
    ],
)
def test_a_check_ends_in_its_status_and_its_last_line(code, status, text, tmp_path):
    after = program("print('goes on')", "after")
    outcome, following = run_checks([program(code), after], tmp_path, 60)
    assert (outcome.status, outcome.text) == (status, text)
    assert (following.status, following.text) == ("passed", "goes on")


def test_a_check_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.01)"
    code = (
        f"import subprocess, sys, os\nsubprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"while not os.path.exists({str(beat)!r}): pass\nprint('started', flush=True)\n{FOREVER}"
    )
    (outcome,) = run_checks([program(code, limit_s=10)], tmp_path, 600)
    assert outcome.status == "failed"
    assert outcome.text == "not done after 10 s: started"
    size = beat.stat().st_size
    time.sleep(0.1)  # ten beats of the child, if it lived
    assert beat.stat().st_size == size


def test_checks_without_time_are_skipped_and_say_so(tmp_path):
    long = program(FOREVER, "long", needs_s=1000)
    short = program("print('done')", "short")
    first, second = run_checks([long, short], tmp_path, 60)
    assert first.status == "skipped"
    assert first.text.startswith("needs 1000 s, ")
    assert second.status == "passed"


def test_the_report_holds_every_check_and_its_figures(tmp_path, monkeypatch, capsys):
    figures = f"import json; json.dump({{'ms': 3}}, open({str(tmp_path / 'a.json')!r}, 'w')); print('ok')"
    checks = [program(figures, "a"), program("exit(1)", "b")]
    monkeypatch.setattr(check_gpu, "gpu_checks", lambda out, device: checks)
    (tmp_path / "b.json").write_text('{"of": "an earlier report"}')
    with pytest.raises(SystemExit) as ended:
        check_gpu.main(["--out", str(tmp_path), "--device", "cpu"])
    assert ended.value.code == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(c["name"], c["status"], c["figures"]) for c in report["checks"]] == [
        ("a", "passed", {"ms": 3}),
        ("b", "failed", None),
    ]
    assert "failed   b" in capsys.readouterr().out
