"""A name that is not a directory: one question to the hub, and one line on what it says."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from lopt_pp.errors import LoptError
from lopt_pp.model.on_hub import check_on_hub

ANSWERS = {
    "someone/model": (200, ""),
    "someone/gated": (403, "GatedRepo"),
    "someone/gone": (401, "RepoNotFound"),
    "someone/old": (404, "RevisionNotFound"),
    "someone/adapter": (404, "EntryNotFound"),
    "someone/busy": (503, ""),
}
"""Status and X-Error-Code, as the hub gives them."""


def _put_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library has read from HF_ENDPOINT when it was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What a hub was asked for that `huggingface_hub` takes for the real one."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            paths.append(self.path)
            status, code = ANSWERS["/".join(self.path.split("/")[1:3])]
            self.send_response(status)
            for name, value in {"X-Error-Code": code, "ETag": "1", "X-Repo-Commit": "0" * 40}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Is silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        _put_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        yield paths
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["someone/model", "someone/adapter", "someone/busy"])
def test_it_is_there_or_may_be(name: str, asked: list[str]) -> None:
    check_on_hub(name)
    check_on_hub(name)
    assert asked == [f"/{name}/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "someone/gone",
            "someone/gone: there is no such directory, and .* has no model of this name .* log in .`hf auth login`",
        ),
        ("someone/gated", "someone/gated: it is gated: ask for access on .*/someone/gated, and log in"),
        ("someone/old", "someone/old: .* has no revision main of it; check --model_revision"),
        ("no name", "no name: there is no such directory, and the hub has no such names"),
    ],
)
def test_it_is_not(name: str, error: str, asked: list[str]) -> None:
    with pytest.raises(LoptError, match=f"^{error}"):
        check_on_hub(name)
    assert len(asked) == (name in ANSWERS)


def test_a_hub_that_cannot_be_reached_is_tried_once(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))
    _put_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(
        LoptError, match=r"^away: there is no such .* and http://127.0.0.1:9 cannot be reached \(.*name a"
    ):
        check_on_hub("away")


def test_one_that_was_fetched_needs_no_hub(asked: list[str], tmp_path: Path) -> None:
    files = tmp_path / "models--someone--fetched"
    (files / "refs").mkdir(parents=True)
    (files / "refs" / "main").write_text("0" * 40)
    (files / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (files / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    check_on_hub("someone/fetched")
    assert asked == []


def test_offline_says_so(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        LoptError, match="^away: there is no such directory, nor .* in the cache .*unset HF_HUB_OFFLINE$"
    ):
        check_on_hub("away")
    assert asked == []
