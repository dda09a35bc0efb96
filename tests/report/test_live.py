"""What a live page is sent, by whom, and to whom: without a browser."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import about, record, write_run

from lopt_pp import cli
from lopt_pp.report.follow import Follower
from lopt_pp.report.live import Live
from lopt_pp.report.run_data import Records
from lopt_pp.report.server import PageServer

FACTS = about([(0, 15), (15, 30)], [[0], [1]]) | {"num_steps": 2000}


def steps(first: int, last: int) -> list[dict[str, Any]]:
    """Records of two stages."""
    return [
        record(stage, step, {"forward": 0.9 - 0.1 * stage}, grad_norm=1.0, loss=2.0 + 1 / step, learning_rate=1e-4)
        for step in range(first, last + 1)
        for stage in (0, 1)
    ]


def add(out: Path, records: list[dict[str, Any]]) -> None:
    with (out / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def made(follower: Follower) -> list[int]:
    """The steps that are known of the last stage."""
    return [] if follower.run is None else [record["step"] for record in follower.run.stages[-1]]


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = Follower(tmp_path / "out")
    assert follower.poll() and not follower.poll()
    assert follower.run is None and follower.state is not None and follower.state.name == "waiting"
    out = write_run(tmp_path / "out", steps(1, 3), FACTS)
    assert follower.poll() and made(follower) == [1, 2, 3]
    taken: list[str | bytes] = []
    add_record = Records.add

    def add_and_count(self: Records, line: str | bytes) -> None:
        taken.append(line)
        add_record(self, line)

    monkeypatch.setattr(Records, "add", add_and_count)
    add(out, steps(4, 5))
    assert follower.poll() and made(follower) == [1, 2, 3, 4, 5] and len(taken) == 4
    assert not follower.poll() and len(taken) == 4


def test_a_line_that_is_still_written_waits(tmp_path: Path) -> None:
    out = write_run(tmp_path, steps(1, 3), FACTS)
    follower = Follower(out)
    text = "".join(json.dumps(record) + "\n" for record in steps(4, 4))
    for part in (text[:10], text[10:-3]):
        with (out / "metrics.jsonl").open("a") as file:
            file.write(part)
        follower.poll()
    assert made(follower) == [1, 2, 3] and follower.unreadable == 0
    with (out / "metrics.jsonl").open("a") as file:
        file.write(text[-3:])
    assert follower.poll() and made(follower) == [1, 2, 3, 4]


def test_a_broken_line_is_told_and_passed_over(tmp_path: Path) -> None:
    out = write_run(tmp_path, steps(1, 3), FACTS)
    (out / "metrics.jsonl").write_text('{"stage": 0, "st\n[]\n\xff\n' + (out / "metrics.jsonl").read_text())
    live = Live(out)
    assert "3 lines of metrics.jsonl cannot be read and are left out" in live.page() and "Task loss" in live.page()


@pytest.mark.parametrize("how", ["a resume", "in place", "another directory"])
def test_a_file_that_is_written_anew_is_read_anew(how: str, tmp_path: Path) -> None:
    """A run that resumes replaces the file; records of steps that are made again are not there twice."""
    out = write_run(tmp_path / "out", steps(1, 9), FACTS)
    follower = Follower(out)
    follower.poll()
    if how == "a resume":
        (out / "new").write_text("".join(json.dumps(record) + "\n" for record in steps(1, 4)))
        (out / "new").replace(out / "metrics.jsonl")
    elif how == "in place":
        # No shorter than before, since it has made more steps by now.
        (out / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps(2, 30)))
    else:
        (out / "metrics.jsonl").unlink()
        assert follower.poll() and made(follower) == []
        write_run(out, steps(1, 4), FACTS)
    assert follower.poll()
    assert made(follower) == ([*range(2, 31)] if how == "in place" else [1, 2, 3, 4])


def test_a_page_is_sent_what_has_changed(tmp_path: Path) -> None:
    out = write_run(tmp_path, steps(1, 700), FACTS)
    live = Live(out)
    page = live.page()
    known = re.search(r'"version":"(.*?)"', page)
    assert known is not None and live.update(known[1], 0) is None
    add(out, steps(701, 701))
    live.refresh()
    update = live.update(known[1], 0)
    assert update is not None
    first, changes = update[0], json.loads(update[1])
    assert "order" not in changes and len(update[1]) < len(page) / 10
    assert {part["key"] for part in changes["parts"]} & {"head", "section-losses", "section-configuration"} == set()
    # One more point of each curve, or a better last one, where several steps make a point.
    assert all(len(xs) == len(ys) == 1 for lines in changes["points"].values() for *_, xs, ys in lines)
    # One who was away gets what was missed meanwhile; a server that does not know the version sends all.
    add(out, steps(702, 703))
    live.refresh()
    later, since_then = live.update(first, 0), live.update(known[1], 0)
    assert later is not None and since_then is not None and later[0] == since_then[0] != first
    for unknown in ("", "nonsense", known[1].replace("-", "0-")):
        everything = live.update(unknown, 0)
        assert everything is not None
        sent = json.loads(everything[1])
        assert sent["order"] == [part["key"] for part in sent["parts"]] and "section-losses" in sent["order"]


def test_what_users_name_cannot_break_out_of_a_live_page(tmp_path: Path) -> None:
    facts = FACTS | {"name": "</script><script>alert(1)</script>"}
    live = Live(write_run(tmp_path, steps(1, 3), facts))
    page = live.page()
    assert "<script>alert" not in page and page.count("</script>") == 3
    update = live.update("", 0)
    assert update is not None and "<" not in update[1]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    server = PageServer(write_run(tmp_path / "out", steps(1, 3), FACTS), 0)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.shutdown()
    thread.join(60)
    assert not thread.is_alive()


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


def test_the_page_is_all_that_is_served(server: PageServer) -> None:
    answer = ask(server, "/")
    assert answer.status == 200 and "What to make of it" in answer.read().decode()
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and answer.headers["Access-Control-Allow-Origin"] is None
    for path in ("/metrics.jsonl", "/../out/run.json", "/%2e%2e/run.json", "//etc/passwd", "/./", "/events/"):
        answer = ask(server, path)
        assert (answer.status, answer.read()) == (404, b"the page is /\n"), path
    assert ask(server, "/favicon.ico").status == 204
    assert all(ask(server, "/", method).status == 501 for method in ("POST", "PUT", "DELETE", "OPTIONS"))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1234", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:6007", 403),
        ("localhost@evil.example", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/events"])
def test_other_names_of_this_machine_are_refused(server: PageServer, host: str, path: str, status: int) -> None:
    assert ask(server, path, Host=host).status == status


def test_it_listens_on_the_loopback_interface_alone(server: PageServer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1" and server.address == f"http://127.0.0.1:{server.port}/"


def event(answer: http.client.HTTPResponse) -> tuple[str, dict[str, Any]]:
    """The next one: its id, and what it says."""
    fields: dict[str, str] = {}
    while True:
        name, _, value = answer.readline().decode().rstrip("\n").partition(": ")
        if not name and "data" in fields:
            return fields["id"], json.loads(fields["data"])
        fields[name] = value


def test_all_who_look_are_told(server: PageServer, tmp_path: Path) -> None:
    watchers = [ask(server, "/events?since=unknown") for _ in range(12)]
    told = [event(watcher) for watcher in watchers]
    assert len({name for name, _ in told}) == 1 and all("order" in changes for _, changes in told)
    add(tmp_path / "out", steps(4, 4))
    news = [event(watcher) for watcher in watchers]
    assert all("points" in changes and "order" not in changes for _, changes in news)
    # After a lost connection a browser names the last event that it has got; the address has an older one.
    again = ask(server, f"/events?since={told[0][0]}", **{"Last-Event-ID": news[0][0]})
    add(tmp_path / "out", steps(5, 5))
    changes = event(again)[1]
    assert all(xs == [5] for lines in changes["points"].values() for *_, xs, _ in lines) and "order" not in changes


def test_nobody_looks_and_nothing_is_read(server: PageServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    polled = threading.Event()

    def poll(self: Follower) -> bool:
        polled.set()
        return False

    monkeypatch.setattr(Follower, "poll", poll)
    assert not polled.wait(0.2)
    watcher = ask(server, "/events")
    assert polled.wait(60) and watcher.status == 200


def test_a_port_in_use_is_one_line(server: PageServer, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["report", str(tmp_path), "--serve", "--port", str(server.port)]) == 1
    assert capsys.readouterr().err == (
        f"lopt-pp: error: --port {server.port} cannot be used on 127.0.0.1: Address already in use; give another, or 0 "
        f"for any that is free\n"
    )


def test_a_file_is_not_waited_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["report", str(tmp_path / "file"), "--serve", "--port", "0"]) == 1
    assert "file is not a directory; give the --output_dir of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--port 6007", "--port is of the page that --serve serves"),
        ("--serve --output x.html", "--output is of a file that is written"),
        ("--serve --port 65536", "--port: 65536 is not a port"),
        ("--serve --port -1", "--port: -1 is not a port"),
        ("--serve --host 0.0.0.0", "unknown flag --host"),
    ],
)
def test_mistakes_are_one_line(flags: str, error: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", str(tmp_path), *flags.split()])
    assert error in capsys.readouterr().err


def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    """While a page is open, too; and nothing heavy was imported."""
    # A shell that starts tests in the background has them ignore SIGINT.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from lopt_pp.cli import main; status = main(sys.argv[1:])\n"
    code += "print('torch' in sys.modules); sys.exit(status)"
    command = [sys.executable, "-c", code, "report", str(tmp_path / "gone"), "--serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        where, tunnel = process.stdout.readline(), process.stdout.readline()
        port = re.fullmatch(r"the page is at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)\n", where)
        assert port is not None
        assert tunnel.startswith(f"from another machine: ssh -L {port[1]}:127.0.0.1:{port[1]} {socket.gethostname()}, ")
        connection = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=60)
        connection.request("GET", "/events")
        assert "waiting" in event(connection.getresponse())[1]["title"]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "\nFalse\n", "")
