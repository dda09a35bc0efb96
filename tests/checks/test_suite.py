"""`lopt-pp check` says ok where all is well, and FAIL of each thing that is not."""

import json
import shutil
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import lopt_pp.checks.session
from lopt_pp import cli
from lopt_pp.checks import exactness, lifecycle, speed
from lopt_pp.checks.result import CheckFailed, NotHere, Result, as_json, reason
from lopt_pp.checks.session import Ran, Session
from lopt_pp.checks.suite import checks_of, chosen, look_at_machine, machine_lines, run_check
from lopt_pp.checks.training import compare
from lopt_pp.checks.waits import waits
from lopt_pp.config.topology import Topology
from lopt_pp.distributed.launch import Outcome

TWO = Topology(2, 2)


@pytest.mark.slow
def test_all_is_well_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some of the checks; the rest of the tests does by itself what the others do."""
    file, kept = tmp_path / "check.json", tmp_path / "runs"
    words = ["exactness: 2 stages", "not finite", "SIGUSR1", "waits", "links"]
    assert cli.main(["check", "--only", *words, "--json", str(file), "--keep", str(kept)]) == 0
    said = json.loads(file.read_text())
    assert said["ok"] and len(said["machine"]["processes"]) == 2 and said["machine"]["versions"]["torch"]
    names = ["exactness: 2 stages", "a loss is not finite", "SIGUSR1 stops the run", "host waits", "links"]
    assert [(check["name"], check["outcome"]) for check in said["checks"]] == [(name, "ok") for name in names]
    assert said["checks"][0]["figures"] == {"weights": "bit for bit the same"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("versions  python") and lines[1].startswith("rank 0    ")
    assert [line.split(" (")[0] for line in lines[-5:]] == [f"ok    {name}" for name in names]
    assert (kept / "stop" / "rank-0.log").exists()
    link = said["checks"][-1]["figures"]
    assert link["0-1 GB/s"] > 0 and link["0-1 latency in ms"] > 0 and 0 <= link["0-1 overlap"] <= 1


class Scripted(Session):
    """A session whose runs end as the test says.

    Args:
        folder: of it.
        leave: is given each run's folder, and leaves there what it left.
        ending: of each run: the statuses of its processes, and what they printed.
    """

    def __init__(
        self, folder: Path, ending: tuple[list[int | None], str] = ([0, 0], ""), leave: Callable[[Path], Any] = str
    ) -> None:
        super().__init__(TWO)
        self.folder = folder
        self._ending = ending
        self._leave = leave

    def run(self, name: str, *_: Any, **options: Any) -> Ran:
        statuses, text = self._ending
        self._leave(self.folder / name / "out")
        return Ran(self.folder / name, statuses, [text], [None], {"SIGALRM"} if text == "hangs" else set(), set())


def write(value: float) -> Callable[[Path], None]:
    """Leaves a model, of one tensor, and a checkpoint."""

    def leave(out: Path) -> None:
        for folder in (out, out / "last_good"):
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"weight": torch.full((2,), value)}, folder / "model.safetensors")
            (folder / "model.safetensors.index.json").touch()

    return leave


FAILED = "[stage 0] lopt-pp: error: stage 0 (rank 0) lost its keys\n"


@pytest.mark.parametrize(
    ("check", "ending", "leave", "why"),
    [
        (
            exactness.Exactness("e", TWO),
            ([1, 1], FAILED),
            write(1.0),
            "a run has failed: stage 0 (rank 0) lost its keys",
        ),
        (exactness.Exactness("e", TWO), ([0, 0], "hangs"), write(1.0), "a run did not end; where each process was"),
        (exactness.Exactness("e", TWO), ([0, 0], ""), write(float("nan")), "differ by up to nan in weight"),
        (exactness.Exactness("e", TWO), ([0, 0], ""), str, "left no model"),
        (lifecycle.resume, ([0, 0], ""), write(1.0), "left no checkpoint-4"),
        (lifecycle.restart, ([1, None], FAILED), str, "started again failed: stage 0 (rank 0) lost its keys"),
        (lifecycle.kill, ([1, None], FAILED), str, "rank 1 was killed, and the others did not say so, but: stage 0"),
        (lifecycle.kill, ([None, None], "hangs"), str, "a process was killed, and the others did not end"),
        (lifecycle.kill, ([0, 0], ""), str, "the run ended as if nothing had happened"),
        (lifecycle.hang, ([1, 1], FAILED), str, "rank 0 hung for 4 s, and its neighbour did not say so"),
        (lifecycle.not_finite, ([1, 1], FAILED), str, "the last good weights were not saved: stage 0 (rank 0) lost"),
        (lifecycle.not_finite, ([1, 1], FAILED), write(float("inf")), "weights that were saved are not either: weight"),
        (lifecycle.stop, ([0, 0], ""), str, "after SIGUSR1 the processes ended with [0, 0] and not 75"),
        (lifecycle.stop, ([75, 75], ""), str, "left no checkpoint"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, check: Any, ending: tuple[list[int | None], str], leave: Callable[[Path], Any], why: str
) -> None:
    result = run_check("it", check, Scripted(tmp_path, ending, leave=leave))
    assert result.outcome == "FAIL" and why in result.message and "\n" not in result.message
    assert result.line() == f"FAIL  it: {result.message}"


def on_gpus(session: Session, results: list[Any]) -> Session:
    """The same session on GPUs of its own, whose processes find something."""
    session.backend = "nccl"
    run = session.run
    session.run = lambda *arguments, **options: replace(run(*arguments, **options), results=results)  # type: ignore[method-assign]
    return session


def test_a_link_that_holds_up_the_computation(tmp_path: Path) -> None:
    ends = [{"0-1": {"bandwidth": 2e9, "latency": 1e-5, "overlap": overlap}} for overlap in (0.9, 0.1)]
    result = run_check("links", speed.links, on_gpus(Scripted(tmp_path), ends))
    assert result.outcome == "FAIL" and "0-1 overlap is 0.10: transfers and computation take turns" in result.message
    result = run_check("links", speed.links, on_gpus(Scripted(tmp_path), ends[:1]))
    assert result.figures == {"0-1 GB/s": 2.0, "0-1 latency in ms": 0.01, "0-1 overlap": 0.9}


def test_a_host_that_waits(tmp_path: Path) -> None:
    none: dict[str, Any] = {"microbatches": 8, "places": {}}
    some = {"microbatches": 8, "places": {"objectives/task.py:7": 12, "stage/stage.py:9": 4}}
    assert run_check("waits", waits, on_gpus(Scripted(tmp_path), [none] * 2)).outcome == "ok"
    nothing = {"microbatches": 0, "places": {}}
    assert run_check("waits", waits, on_gpus(Scripted(tmp_path), [nothing] * 2)).outcome == "FAIL"
    message = run_check("waits", waits, on_gpus(Scripted(tmp_path), [none, some])).message
    assert "waits for the GPU 1 times a microbatch, mostly at objectives/task.py:7 (12 times in 16" in message


def test_processes_that_are_slower_than_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(out: Path) -> None:
        out.mkdir(parents=True)
        (out / "model.safetensors.index.json").touch()
        seconds = 2.0 if "together" in out.parent.name else 1.0
        lines = [{"stage": 1, "num_tokens": 100, "step_seconds": step * seconds} for step in (9, 1)]
        (out / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    session = Scripted(tmp_path, leave=leave)
    monkeypatch.setattr(speed, "write_model", lambda *_, **__: None)
    monkeypatch.setattr(speed, "write_rows", lambda *_: None)
    result = run_check("speed", speed.throughput, session)
    assert result.figures == {"tokens/s of 2 processes": 50, "of one": 100, "times": 0.5}
    shutil.rmtree(tmp_path)
    result = run_check("speed", speed.throughput, on_gpus(session, []))
    assert result.outcome == "FAIL" and "2 processes train 50 tokens/s, and one trains 100" in result.message


def test_bits_that_differ_on_a_gpu(tmp_path: Path) -> None:
    values = iter((1.0, 1.0, 1.0, 1.0000001))

    def leave(out: Path) -> None:
        write(next(values))(out)

    assert run_check("bits", lifecycle.same_bits, Scripted(tmp_path, leave=leave)).outcome == "skip"
    session = on_gpus(Scripted(tmp_path, leave=leave), [])
    assert run_check("bits", lifecycle.same_bits, session).figures == {"weights": "bit for bit the same"}
    assert "differ by up to 1.2e-07" in run_check("bits", lifecycle.same_bits, session).message


def test_weights_that_differ_by_more_than_rounding(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("near", 1.00001), ("far", 1.001)):
        write(value)(tmp_path / name)
    assert compare(tmp_path / "one", tmp_path / "one") == {"weights": "bit for bit the same"}
    assert compare(tmp_path / "one", tmp_path / "near")["weights differ by at most"] == pytest.approx(1e-5, rel=0.1)
    with pytest.raises(CheckFailed, match=r"differ by up to 0\.001 in weight .*Do not train in this layout"):
        compare(tmp_path / "one", tmp_path / "far")


def test_a_check_that_these_devices_do_not_allow_is_no_failure() -> None:
    def check(session: Session) -> dict[str, Any]:
        raise NotHere("there is no GPU")

    result = run_check("it", check, Session(TWO))
    assert result.line() == "skip  it: there is no GPU"
    assert json.loads(as_json({}, [result]))["ok"]
    assert not json.loads(as_json({}, [result, Result("other", "FAIL", 1.0, "broken")]))["ok"]


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (["a\n", "[x] lopt-pp: error: out of keys.\nTraceback\nValueError: no\n"], "out of keys"),
        (
            ["a\nTraceback (most recent call last):\n  File x\ntorch.CudaError: much\nb\n"],
            "torch.CudaError: much",
        ),
        (["a\nb\n\n", ""], "b"),
        (["", ""], "it printed nothing"),
    ],
)
def test_the_reason_is_the_line_that_says_most(texts: list[str], line: str) -> None:
    assert reason(texts) == line


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_kind_of_layout_that_fits_is_tried(size: int) -> None:
    topologies = [check.topology for check in exactness.layouts(Topology(size, size))]
    assert all(topology.world_size == size for topology in topologies)
    assert any(topology.num_stages > topology.num_processes > 1 for topology in topologies)
    assert any(topology.num_replicas == size for topology in topologies)
    assert any(topology.num_replicas > 1 < topology.num_processes for topology in topologies) == (size in (4, 8))


def test_names_are_told_apart_and_chosen_by_their_words() -> None:
    session = Session(Topology(2, 2, 2))
    assert list(chosen(session, ["finite", "SIGUSR1"])) == ["a loss is not finite", "SIGUSR1 stops the run"]
    assert chosen(session, []).keys() == checks_of(session).keys()
    with pytest.raises(CheckFailed, match="--only tea: no check has that in its name; there are: exactness"):
        chosen(session, ["tea"])


def gpu(uuid: str) -> dict[str, Any]:
    return {"name": "GPU", "uuid": uuid, "memory_bytes": 2**30, "compute_capability": "9.0", "peers": []}


@pytest.mark.parametrize(
    ("seen", "asked", "backend", "shares"),
    [
        ([[gpu("a")], [gpu("a")]], "auto", "nccl", True),
        ([[gpu("a")], [gpu("b")]], "auto", "nccl", False),
        ([[gpu("a"), gpu("b")]] * 2, "nccl", "nccl", False),
        ([[gpu("a"), gpu("b")], [gpu("b"), gpu("a")]], "nccl", "nccl", True),
        ([[gpu("a")], []], "auto", "gloo", False),
        ([[gpu("a")], [gpu("b")]], "gloo", "gloo", False),
    ],
)
def test_the_backend_follows_from_the_devices(
    tmp_path: Path, seen: list[list[dict[str, Any]]], asked: Any, backend: str, shares: bool
) -> None:
    class Looked(Scripted):
        def run(self, name: str, *_: Any, **options: Any) -> Ran:
            common = {"host": "n1", "cpu": "CPU", "cores": 2}
            found = [
                common | {"local_rank": rank, "gpus": gpus, "unusable": "" if gpus else "no driver"}
                for rank, gpus in enumerate(seen)
            ]
            return Ran(self.folder, [0, 0], [""], found, set(), set())

    session = Looked(tmp_path)
    machine = look_at_machine(session, asked)
    assert (session.backend, session.shares_gpus) == (backend, shares)
    assert machine["backend"] == backend
    if backend == "gloo" and asked == "auto":
        with pytest.raises(CheckFailed, match="--backend nccl, and rank 1: no driver; give --backend gloo"):
            look_at_machine(Looked(tmp_path), "nccl")


def test_the_gpu_that_is_shown_is_the_one_that_is_taken() -> None:
    node = {"host": "n2", "local_rank": 0, "gpus": [gpu("a"), gpu("b")], "unusable": ""}
    machine = {"versions": {}, "backend": "nccl", "processes": [node, node], "shares_gpus": False, "links": ""}
    lines = machine_lines(machine | {"without GPUs because": []})
    assert "1 GiB, a," in lines[2] and lines[2].startswith("rank 1")


def test_an_interruption_leaves_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stopped = Outcome({0: 130, 1: 130}, {}, signal.SIGINT)
    monkeypatch.setattr(lopt_pp.checks.session, "launch", lambda *_, **__: stopped)
    with pytest.raises(KeyboardInterrupt), Session(TWO) as session:
        assert session.folder.parent == tmp_path
        session.run("it", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--nproc 1", "a check takes 2 processes at least"),
        ("--nproc 3 --data_parallel 2", "3 processes do not fit"),
        ("--nproc 0", "--nproc: at least 1"),
        ("--keep .", "is not empty; name a new folder"),
    ],
)
def test_mistakes(flags: str, error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    try:
        status = cli.main(["check", *flags.split()])
    except SystemExit as left:
        status = int(str(left.code))
    assert status == 2 and error in capsys.readouterr().err
