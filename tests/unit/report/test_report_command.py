"""The command report: mistakes in a line, and a served page that follows its run."""

import json
import threading
import urllib.error
import urllib.request

import pytest
from report_runs import STEPS, log_rows, make_run, serving, write_log

from vidssl.commands import report as command
from vidssl.core.errors import UserError
from vidssl.pictures.strips import group
from vidssl.report import page, watch
from vidssl.report.contents import make_contents


@pytest.fixture(autouse=True)
def no_plotly(monkeypatch):
    """The library is 5 MB of text that no test here looks at."""
    monkeypatch.setattr(page, "plotly_script", lambda: "/* plotly */")


def test_a_page_is_written_and_its_verdicts_are_printed(tmp_path, capsys):
    run = make_run(tmp_path / "a", collapse_at=20)
    command.main([str(run), "-o", str(tmp_path / "pages" / "a.html"), "--no-pictures"])
    text = (tmp_path / "pages" / "a.html").read_text()
    assert "%%" not in text and "/* plotly */" in text and '"name":"a"' in text
    out = capsys.readouterr().out
    assert "1 run, " in out and "a: Has it learned? No, its features have collapsed" in out


def test_mistakes_are_said_before_any_work(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(UserError, match=r"ends in \.html"):
        command.main([str(run), "-o", str(tmp_path / "a.pdf")])
    with pytest.raises(UserError, match="no such folder"):
        command.main([str(tmp_path / "none"), "-o", str(tmp_path / "a.html")])


def test_shards_and_runs_are_not_mixed(tmp_path):
    (tmp_path / "shards" / "train").mkdir(parents=True)
    (tmp_path / "shards" / "train" / "index.json").write_text("{}")
    run = make_run(tmp_path / "a")
    with pytest.raises(UserError, match="reports of their own"):
        command.main([str(tmp_path / "shards"), str(run)])
    with pytest.raises(UserError, match="are for shards"):
        command.main([str(run), "--search", "none"])


@pytest.fixture
def served(tmp_path):
    """(address, run folder) of a page that is served."""
    run = make_run(tmp_path / "a")
    write_log(run, log_rows(10))
    live = watch.LiveContents([run], lambda _: make_contents([run], ["vidssl"]))
    with serving(live) as address:
        yield address, run


def get(address, **headers):
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60)


def test_a_served_page_follows_its_run(served):
    address, run = served
    with get(f"{address}/") as answer:
        assert "connect-src 'self'" in answer.read().decode()
    with get(f"{address}/contents.json") as answer:
        first = json.load(answer)
    assert first["runs"][0]["last"]["step"] == 10
    with get(f"{address}/contents.json?since={first['number']}") as answer:
        assert answer.status == 204
    write_log(run, log_rows(12), '{"step": 13, "lo')
    with get(f"{address}/contents.json?since={first['number']}") as answer:
        assert json.load(answer)["runs"][0]["last"]["step"] == 12


def test_figures_of_a_watched_page_do_not_wait_for_pictures(tmp_path):
    run = make_run(tmp_path / "a")
    may_draw = threading.Event()
    groups = [group("masks", "Masks", "")]

    def draw(_):
        may_draw.wait(60)
        return groups

    live = watch.LiveContents([run], lambda draw: make_contents([run], ["vidssl"], draw), draw)
    first, contents = live.current()
    assert contents["runs"][0]["last"]["step"] == STEPS
    assert [shown["about"] for shown in contents["pictures"]] == ["They are being drawn."]
    assert live.current()[0] == first
    may_draw.set()
    live.pictures.thread.join()
    second, contents = live.current()
    assert second > first and contents["pictures"] == groups
    live.pictures.thread.join()
    assert live.current()[0] == second


@pytest.mark.parametrize(
    "path, headers, status", [("/config.yaml", {}, 404), ("/", {"Host": "evil.org"}, 403)]
)
def test_nothing_else_is_served(served, path, headers, status):
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(served[0] + path, **headers)
    assert refused.value.code == status


def test_ctrl_c_ends_a_watch(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a")
    servers = []

    def interrupt(server):
        servers.append(server)
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.ThreadingHTTPServer, "serve_forever", interrupt)
    with pytest.raises(KeyboardInterrupt):
        command.main([str(run), "--watch", "--port", "0", "--no-pictures"])
    assert servers[0].socket.fileno() == -1
    assert f"http://127.0.0.1:{servers[0].server_port}/" in capsys.readouterr().out
