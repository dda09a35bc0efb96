"""`python -m benchmarks.scaling`: what it prints and writes, and the tables in docs/scaling.md."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from families import tiny_config
from launching import TESTS

from benchmarks.scaling import __main__ as scaling
from benchmarks.scaling import arithmetic
from benchmarks.scaling.model_sizes import MODELS

PAGE = TESTS.parent / "docs" / "scaling.md"


@pytest.mark.parametrize("name", list(MODELS))
def test_a_run_in_detail(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scaling.json"
    flags = ["--model", name, "--num_stages", "4", "--data_parallel", "2", "--split", "auto", "--latency_ms", "1", "50"]
    scaling.main([*flags, "--output", str(output)])
    (run,) = json.loads(output.read_text())["runs"]
    assert run["gpus"] == 8
    assert len(run["stages"]) == 4
    for stage in run["stages"]:
        memory = stage["memory"]
        assert memory.keys() == {field.name for field in fields(arithmetic.Memory)}
        assert sum(memory.values()) == stage["total_bytes"]
        assert memory["weights"] == 4 * stage["parameters"]
        assert stage["fits"] == (stage["total_bytes"] <= 80 * 2**30)
    rates = run["boundary"]
    assert rates["bytes_per_second"] == pytest.approx(rates["bytes_per_microbatch"] / run["microbatch_seconds"])
    assert run["auto_split"]["microbatch_seconds"] == pytest.approx(run["microbatch_seconds"])
    assert [at["delay_seconds"] for at in run["delays"]] == [0.001, 0.05]
    assert all(at["step_seconds_1f1b"] > at["step_seconds"] for at in run["delays"])
    assert run["one_f_one_b"]["bubble"] == pytest.approx(3 / 19)
    # Two replicas: 2 (d - 1)/d = 1 times the float32 gradient, once a step.
    assert all(stage["replica_bytes_per_step"] == 4 * stage["parameters"] for stage in run["stages"])
    assert all(stage["replica_bytes_per_microbatch"] == 0 for stage in run["stages"])
    assert MODELS[name].name in capsys.readouterr().out


def test_the_directory_of_a_config_is_a_model(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    scaling.main(["--model", str(tmp_path), "--output", str(tmp_path / "scaling.json")])
    assert (tmp_path / "scaling.json").exists()


def test_a_model_that_the_formulas_do_not_fit_is_refused(tmp_path: Path) -> None:
    tiny_config("gpt2").save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="gpt2: the formulas hold for"):
        scaling.main(["--model", str(tmp_path), "--output", str(tmp_path / "scaling.json")])


def documented_commands() -> list[str]:
    """The flags of the commands in docs/scaling.md that are there without their output."""
    return re.findall(r"^python -m benchmarks.scaling *(.*?) *(?:#.*)?$", PAGE.read_text(), flags=re.M)


@pytest.mark.parametrize("flags", documented_commands())
def test_documented_commands_run(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_config("llama").save_pretrained(tmp_path / "model")
    scaling.main(flags.split())
    assert ("Memory, GiB" in capsys.readouterr().out) == ("--model" in flags)
    assert json.loads((tmp_path / "scaling.json").read_text())["runs"]


def documented_tables() -> list[tuple[str, str]]:
    """The commands in docs/scaling.md with the output below each."""
    text = PAGE.read_text()
    blocks = re.findall(r"^```text\n\$ python -m benchmarks.scaling ?(.*?)\n(.*?)```$", text, flags=re.M | re.S)
    return [(flags, output) for flags, output in blocks]


@pytest.mark.parametrize(("flags", "expected"), documented_tables())
def test_documented_tables_are_what_is_printed(
    flags: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling.main([*flags.split(), "--output", str(tmp_path / "scaling.json")])
    assert capsys.readouterr().out == expected
