"""`lopt_pp.launch` runs a function of a script or a notebook in several processes."""

import os
import runpy
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from ranks import context, fork_the_server, until
from results import weights

import lopt_pp
from lopt_pp import LoptError, launch
from lopt_pp.distributed.functions import ProcessFailed
from lopt_pp.distributed.launch import Outcome

SCRIPT = """
import json, os, sys, threading
import lopt_pp
from lopt_pp import Trainer, load_config

FACTOR, LOCK = 3, threading.Lock()

class Answer:
    def __init__(self, value): self.value = value

def place(text):
    return Answer((text, FACTOR * int(os.environ["WORLD_SIZE"]), os.environ["RANK"]))

def fail():
    if os.environ["RANK"] == "1":
        raise ValueError("no such row")
    threading.Event().wait()

def fail_once():
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError("at first")
    return "then"

def use_lock():
    return LOCK.locked()

def train(**more):
    return Trainer(load_config(sys.argv[1] + "/run.yaml", **more)).train()

def wrong_rows():
    return train(train_file=sys.argv[1] + "/wrong.jsonl", output_dir=sys.argv[1] + "/other")

def wrong_metrics():
    calls = []

    def compute(prediction):
        calls.append(prediction)
        return {"a": 1 / (2 - len(calls))}  # It is tried once before.

    rows = [{"prompt": f"what is {number}?", "completion": str(number)} for number in range(8)]
    more = {"num_stages": 2, "max_steps": 2, "eval_steps": 1, "save_steps": 0, "output_dir": sys.argv[1] + "/third"}
    given = {"train_dataset": rows, "eval_dataset": rows[:2], "compute_metrics": compute}
    Trainer(sys.argv[1] + "/model", more, **given).train()

before = dict(os.environ)
said = {"place": lopt_pp.launch(place, ("a",), nproc=2).value}
said["one"] = lopt_pp.launch(lambda: os.getpid(), nproc=1) == os.getpid()
said["again"] = lopt_pp.launch(fail_once, nproc=2, max_restarts=1)
said["trained"] = bool(lopt_pp.launch(train, nproc=2))
for function in (fail, use_lock, wrong_rows, wrong_metrics):
    try:
        lopt_pp.launch(function, nproc=2)
    except lopt_pp.LoptError as error:
        said[function.__name__] = [str(error), *getattr(error, "__notes__", [])]
said["environment"] = os.environ == before
print(json.dumps(said))
"""
"""Without a guard: it must not run again in the processes that it starts."""


def _run_script(folder: Path) -> None:
    with (folder / "shown").open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    fork_the_server()
    torch.set_num_threads(1)
    sys.argv = [str(folder / "script.py"), str(folder)]
    runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.mark.slow
def test_functions_of_a_script(inputs: Path, tmp_path: Path) -> None:
    import json

    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "model").symlink_to(inputs / "model")
    (tmp_path / "wrong.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {inputs / 'model'}\ntrain_file: {inputs / 'rows.jsonl'}\noutput_dir: {tmp_path / 'out'}\n"
        f"max_steps: 2\nsave_steps: 0\nbackend: gloo\n"
    )
    process = context.Process(target=_run_script, args=(tmp_path,))
    process.start()
    process.join(120)
    shown = (tmp_path / "shown").read_text()
    assert process.exitcode == 0, shown
    *lines, last = shown.splitlines()
    said = json.loads(last)
    assert said["place"] == ["a", 6, "0"] and said["one"] and said["again"] == "then" and said["trained"]
    assert weights(tmp_path / "out")
    text, trace = said["fail"]
    assert text == "rank 1: ValueError: no such row" and "in fail" in trace
    (text,) = said["use_lock"]
    assert text.startswith("launch: use_lock cannot be sent to another process: TypeError: cannot pickle")
    (text,) = said["wrong_rows"]
    assert text.startswith("rank ") and ": row 1 of " in text and "no usable columns" in text
    (text,) = said["wrong_metrics"]
    assert text == "rank 1: compute_metrics fails: ZeroDivisionError: division by zero (line 38)", text
    assert said["environment"]
    assert not [line for line in lines if "error" in line or "Traceback" in line], "it is raised, and not printed too"


def _interrupted(folder: Path) -> None:
    fork_the_server()

    def wait() -> None:
        (folder / os.environ["RANK"]).touch()
        threading.Event().wait()

    try:
        launch(wait, nproc=2)
    except KeyboardInterrupt:
        os._exit(5)


def test_ctrl_c_ends_all(tmp_path: Path) -> None:
    process = context.Process(target=_interrupted, args=(tmp_path,))
    process.start()
    until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists(), 60)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 5


def test_a_function_that_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process says nothing, and the launcher knows its rank."""
    outcome = Outcome({0: None, 1: None}, failed={1: 3})
    monkeypatch.setattr("lopt_pp.distributed.launch.launch", lambda *args, **given: outcome)
    with pytest.raises(ProcessFailed, match="^rank 1: the function has ended its process with exit status 3$"):
        launch(sys.exit, (3,), nproc=2)


def test_in_a_process_that_is_one_of_several_it_is_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert lopt_pp.launch(os.getpid, nproc=2) == os.getpid()


def test_what_cannot_be() -> None:
    with pytest.raises(LoptError, match="launch: nproc 0: at least 1"):
        launch(os.getpid, nproc=0)
    for wrong in ("2", 2.0, [2]):
        with pytest.raises(LoptError, match=r"^launch: nproc is .*2.*; give a whole number$"):
            launch(os.getpid, nproc=wrong)  # type: ignore[arg-type]
    with pytest.raises(LoptError, match="^launch: max_restarts is '1'; give a whole number$"):
        launch(os.getpid, max_restarts="1")  # type: ignore[arg-type]
    for given in (("getpid", ()), (os.kill, 3), (print, "ab")):
        with pytest.raises(LoptError, match="^launch: give a function, and its arguments as a tuple: "):
            launch(*given)
    said: list[str] = []

    def elsewhere() -> None:
        with pytest.raises(LoptError) as refused:
            launch(os.getpid, nproc=2)
        said.append(str(refused.value))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert said == ["launch: call it in the main thread, which alone hears signals"]
