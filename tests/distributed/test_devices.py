"""What a process computes on, and whether that of all processes fits together. GPUs are imitated."""

import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lopt_pp.distributed import devices
from lopt_pp.distributed.devices import Placement, agree_on_devices, check_gpu, choose_device, count_usable_gpus
from lopt_pp.errors import LoptError

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver."
NAME = "NVIDIA H200"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has PyTorch see GPUs, by their uuids; what fails is raised for a GPU by its number."""

    def see(*uuids: str, fails: Callable[[int], None] = lambda number: None) -> None:
        def set_device(device: torch.device) -> None:
            fails(device.index)

        def properties(device: torch.device) -> SimpleNamespace:
            return SimpleNamespace(name=NAME, uuid=uuids[device.index])

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
        monkeypatch.setattr(devices, "is_nccl_available", lambda: True)
        monkeypatch.setattr(devices, "_compute_on", lambda device: None)

    return see


def too_old(number: int) -> None:
    raise RuntimeError(TOO_OLD)


def no_kernels(number: int) -> None:
    if number == 1:
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors ..."
        )


def agree(placements: Sequence[Placement]) -> list[str]:
    """What each process is told, the processes as threads with connections of their own to one store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    told = [""] * len(placements)

    def join(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=30))
        try:
            told[rank] = agree_on_devices(store, rank, len(placements), placements[rank])
        except LoptError as error:
            told[rank] = f"error: {error}"

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(len(placements))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def on_gpu(uuid: str, host: str = "node1", nccl_host: str = "") -> Placement:
    versions = {"PyTorch": "2.13.0", "NCCL": "2.27.3"}
    return Placement("cuda:0", "nccl", host, NAME, uuid, nccl_host or host, versions=versions)


def on_cpu(host: str = "node1", **more: str) -> Placement:
    return replace(Placement("cpu", "gloo", host, versions={"PyTorch": "2.13.0"}), **more)  # type: ignore[arg-type]


def test_gpus_that_nvml_counts_and_cuda_cannot_use_mean_cpus_with_the_reason(gpus: Callable[..., None]) -> None:
    gpus("GPU-a", "GPU-b", fails=too_old)
    placement = choose_device("auto", 1)
    assert (placement.device, placement.backend, placement.reason) == ("cpu", "gloo", TOO_OLD)
    assert agree([placement]) == [f"1 process, on the CPU: {TOO_OLD}"]
    assert count_usable_gpus() == 0


def test_nccl_that_is_asked_for_with_such_gpus_is_an_error_in_all_processes(gpus: Callable[..., None]) -> None:
    gpus("GPU-a", "GPU-b", fails=no_kernels)
    told = agree([choose_device("nccl", 0), choose_device("nccl", 1)])
    assert told[0] == told[1]
    assert told[0] == (
        f"error: rank 1 ({socket.gethostname()}): --backend nccl: this machine has no GPU that PyTorch can use: CUDA "
        "error: no kernel image is available for execution on the device; --backend gloo trains on CPUs"
    )
    assert count_usable_gpus() == 1


def test_gloo_that_is_asked_for_looks_for_no_gpu(gpus: Callable[..., None]) -> None:
    gpus("GPU-a", fails=too_old)
    placement = choose_device("gloo", 0)
    assert (placement.device, placement.backend, placement.reason) == ("cpu", "gloo", "")


def test_without_a_gpu_pytorch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert choose_device("auto", 0).reason == f"this PyTorch ({torch.__version__}) is a build without CUDA"
    with pytest.raises(
        LoptError, match=r"^--device cuda: this PyTorch \(.*\) is a build without CUDA; --device cpu runs"
    ):
        check_gpu(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    assert choose_device("auto", 0).reason == "no GPU is visible"


def test_a_gpu_with_a_number_that_none_has(gpus: Callable[..., None]) -> None:
    gpus("GPU-a", "GPU-b")
    check_gpu(torch.device("cuda:1"))
    with pytest.raises(LoptError, match="^--device cuda:2: the last GPU that PyTorch sees is cuda:1$"):
        check_gpu(torch.device("cuda:2"))


def test_one_visible_gpu_for_each_process_is_its_own(gpus: Callable[..., None]) -> None:
    """As `srun --gpus-per-task 1` and CUDA_VISIBLE_DEVICES for each rank give it: all call theirs number 0."""
    placements = []
    for rank, uuid in enumerate(("GPU-a", "GPU-b")):
        gpus(uuid)
        placements.append(choose_device("auto", rank))
    assert [(placement.device, placement.backend, placement.uuid) for placement in placements] == [
        ("cuda:0", "nccl", "GPU-a"),
        ("cuda:0", "nccl", "GPU-b"),
    ]
    assert agree(placements) == ["2 processes, on 2 x NVIDIA H200 over NCCL 2.27.3"] * 2


def test_each_process_takes_the_gpu_of_its_number(gpus: Callable[..., None]) -> None:
    gpus("GPU-a", "GPU-b")
    assert [choose_device(backend, rank).device for backend, rank in (("auto", 0), ("nccl", 1))] == ["cuda:0", "cuda:1"]


def test_fewer_gpus_than_processes_are_an_error_that_says_what_to_do(gpus: Callable[..., None]) -> None:
    gpus("GPU-a", "GPU-b")
    told = agree([choose_device("auto", rank) for rank in range(4)])
    assert len(set(told)) == 1
    assert told[0] == (
        f"error: {socket.gethostname()} has 4 processes and 2 GPUs for them (NVIDIA H200): start one process for each "
        "GPU, such as torchrun --nproc-per-node 2 (a process may hold several stages), or train on CPUs by --backend "
        "gloo"
    )


def test_two_processes_may_share_a_gpu_where_nccl_takes_them_for_two_machines(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus("GPU-a")
    placements = []
    for rank in (0, 1):
        monkeypatch.setenv("NCCL_HOSTID", str(rank))
        placements.append(choose_device("nccl", rank))
    assert not any(text.startswith("error") for text in agree(placements))
    assert agree([on_gpu("GPU-a"), on_gpu("GPU-a", "node2")])[0].startswith("2 processes on 2 machines")


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (on_cpu("node2", reason=TOO_OLD), f"and rank 1 (node2) on a CPU over gloo ({TOO_OLD}); all processes need the"),
        (on_cpu("node2"), "rank 0 (node1) computes on a GPU (NVIDIA H200) over NCCL, and rank 1 (node2) on a CPU over"),
        (
            replace(on_gpu("GPU-b", "node2"), versions={"PyTorch": "2.13.0", "NCCL": "2.26.2"}),
            "rank 0 (node1) has NCCL 2.27.3, and rank 1 (node2) has 2.26.2; install the same version",
        ),
    ],
)
def test_another_device_or_version_on_one_machine_is_an_error_at_once(second: Placement, says: str) -> None:
    told = agree([on_gpu("GPU-a"), second])
    assert told[0] == told[1]
    assert told[0].startswith("error") and says in told[0]


def test_the_log_line_is_short_however_many_there_are() -> None:
    assert agree([on_cpu(), on_cpu(), on_cpu("node2")])[0] == "3 processes on 2 machines, on CPUs over gloo"
    different = [on_gpu("GPU-a"), on_gpu("GPU-b"), replace(on_gpu("GPU-c"), name="NVIDIA A100")]
    assert agree(different)[0] == "3 processes, on 2 x NVIDIA H200, 1 x NVIDIA A100 over NCCL 2.27.3"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_gpu_is_taken_with_its_name_and_uuid() -> None:
    placement = choose_device("auto", 0)
    assert (placement.device, placement.backend) == ("cuda:0", "nccl")
    assert placement.name == torch.cuda.get_device_name(0) and placement.uuid and placement.versions["NCCL"]
    assert count_usable_gpus() == torch.cuda.device_count() and torch.cuda.current_device() == 0
    twice = [replace(placement, nccl_host="node1")] * 2
    assert "has 2 processes and 1 GPU for them" in agree(twice)[0]
