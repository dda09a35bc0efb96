"""The same program on a GPU: NCCL for the stream, CUDA events for the clock. Two ranks may share one GPU.

What users can try by `lopt-pp check` is tried by it here, too, all at once; then what only tests look at.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from safetensors.torch import load_file
from tiny import InputsWith

from lopt_pp import cli
from lopt_pp.checks.session import Session
from lopt_pp.checks.suite import checks_of
from lopt_pp.config.topology import Topology

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def files(inputs_with: InputsWith) -> Path:
    return inputs_with(rows=37, tie_word_embeddings=True)


def train(files: Path, out: Path, processes: int, flags: str = "") -> dict[str, torch.Tensor]:
    """The weights after a run on the GPU."""
    given = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --output_dir {out / 'out'}"
    given += " --backend nccl --learning_rate 1e-3 --adam_epsilon 1e-6 --max_steps 8 --per_device_train_batch_size 3"
    arguments = [*given.split(), *flags.split()]
    with ranks(out, *[arguments] * processes, hosts=True) as started:
        for rank in started:
            assert rank.status(180) == 0, rank.text
    tensors = [load_file(file) for file in (out / "out").glob("*.safetensors")]
    return {name: tensor for shard in tensors for name, tensor in shard.items()}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `lopt-pp check` says of two processes on the GPUs that are there, by the names of its checks."""
    file = tmp_path_factory.mktemp("check") / "check.json"
    status = cli.main(["check", "--nproc", "2", "--backend", "nccl", "--json", str(file)])
    said = json.loads(file.read_text())
    assert (status == 0) == said["ok"]
    assert said["machine"]["backend"] == "nccl" and said["machine"]["shares_gpus"] == (torch.cuda.device_count() == 1)
    return {check["name"]: check for check in said["checks"]}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", checks_of(Session(Topology(2, 2))))
def test_the_check_of_two_nccl_ranks_is_ok(checked: dict[str, Any], name: str) -> None:
    assert checked[name]["outcome"] == "ok", checked[name]["message"]


@pytest.mark.parametrize("flags", ["--gradient_accumulation_steps 3 --queue_depth 1", "--gradient_checkpointing true"])
def test_two_nccl_ranks_equal_one_process(files: Path, tmp_path: Path, flags: str) -> None:
    first, second = train(files, tmp_path / "1", 1, flags), train(files, tmp_path / "2", 2, flags)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=2e-5, msg=partial("{}: {}".format, name))


@pytest.mark.parametrize("dtype", ["bfloat16", "pure_bfloat16"])
def test_bfloat16_learns(files: Path, tmp_path: Path, dtype: str) -> None:
    train(files, tmp_path, 2, f"--dtype {dtype} --max_steps 30")
    losses = [record["loss"] for record in metrics(tmp_path) if record["stage"] == 1]
    assert losses[-1] < 0.8 * losses[0]


def test_full_determinism_gives_the_same_bits_each_time_and_in_one_process(files: Path, tmp_path: Path) -> None:
    flags = "--full_determinism true --dtype bfloat16"
    first, again = (train(files, tmp_path / name, 2, flags) for name in ("first", "again"))
    alone = train(files, tmp_path / "alone", 1, flags)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor, alone[name]), name


def test_the_clock_and_the_memory_are_the_gpus(files: Path, tmp_path: Path) -> None:
    train(files, tmp_path, 2)
    for record in metrics(tmp_path):
        phases = [record[f"{phase}_seconds"] for phase in ("forward", "backward", "optimizer")]
        assert min(phases) > 0 and sum(phases) <= record["step_seconds"] * 1.05
        assert 0 < record["peak_memory_bytes"] < 2**30


def test_float32_products_are_whole(files: Path, tmp_path: Path) -> None:
    """The GPU gives the CPU's weights, within rounding: TF32 is not taken without being asked for."""
    on_gpu, on_cpu = train(files, tmp_path / "gpu", 1), train(files, tmp_path / "cpu", 1, "--backend gloo")
    for name, tensor in on_gpu.items():
        torch.testing.assert_close(tensor, on_cpu[name], rtol=0, atol=1e-4)


def test_two_processes_with_one_gpu_are_refused(files: Path, tmp_path: Path) -> None:
    """Where NCCL takes them for one machine, as it does unless NCCL_HOSTID says otherwise."""
    given = (
        f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --output_dir {tmp_path / 'out'}"
    )
    arguments = given.split()
    with ranks(tmp_path, *[arguments] * (torch.cuda.device_count() + 1)) as started:
        assert {rank.status(180) for rank in started} == {2}, started[0].text
    assert "start one process for each GPU" in started[0].text and not (tmp_path / "out").exists()
