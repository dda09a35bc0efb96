"""What is counted as a wait for the GPU on a CPU."""

from collections.abc import Callable

import pytest
import torch

from lopt_pp.util.host_waits import HostWaits, on_host

MASK = torch.tensor([True, False, True])
VALUES = torch.arange(3.0)


@pytest.mark.parametrize(
    ("operator", "code"),
    [
        ("aten._local_scalar_dense", lambda: VALUES.sum().item()),
        ("aten._local_scalar_dense", lambda: bool(MASK.all())),
        ("aten._local_scalar_dense", lambda: 1 if MASK[0] else 0),
        ("aten.equal", lambda: torch.equal(VALUES, VALUES)),
        ("aten.nonzero", lambda: MASK.nonzero()),
        ("aten.index", lambda: VALUES[MASK]),
        ("aten.masked_select", lambda: VALUES.masked_select(MASK)),
        ("aten.index_put_", lambda: VALUES.clone().index_put_((MASK,), torch.ones(2))),
        ("aten._unique2", lambda: torch.unique(VALUES)),
        ("aten.bincount", lambda: torch.bincount(MASK.long())),
        ("aten.repeat_interleave", lambda: torch.repeat_interleave(VALUES, MASK.long())),
        ("tolist", lambda: VALUES.tolist()),
        ("numpy", lambda: VALUES.numpy()),
        ("cpu", lambda: VALUES.cpu()),
    ],
)
def test_what_reads_a_value_or_makes_a_shape_of_values_waits(operator: str, code: Callable[[], object]) -> None:
    with HostWaits() as waits:
        code()
    assert [wait.operator for wait in waits.found] == [operator]
    assert "test_host_waits.py:" in waits.found[0].place


@pytest.mark.parametrize(
    "code",
    [
        lambda: VALUES[torch.tensor([0, 2])],
        lambda: VALUES.index_select(0, torch.tensor([0, 2])),
        lambda: VALUES.clone().masked_fill_(MASK, 0.0),
        lambda: VALUES.clone().index_put_((MASK,), torch.tensor(0.0)),
        lambda: torch.repeat_interleave(VALUES, MASK.long(), output_size=2),
        lambda: torch.where(MASK, VALUES, 0.0),
        lambda: VALUES.to("cpu", non_blocking=True),
        lambda: VALUES.to(torch.float64),
    ],
)
def test_what_stays_on_the_device_does_not(code: Callable[[], object]) -> None:
    with HostWaits() as waits:
        code()
    assert waits.found == []


def test_backward_and_operators_of_python_are_seen_into() -> None:
    @torch.library.custom_op("lopt_pp_test::first", mutates_args=())
    def first(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_full((), tensor[0].item())

    values = torch.ones(3, requires_grad=True)
    chosen = values[MASK].sum()
    with HostWaits() as waits:
        chosen.backward()
        first(VALUES)
    assert [wait.operator for wait in waits.found] == ["aten.index_put", "aten.item"]


def test_what_is_on_the_cpu_anyway_may_be_read() -> None:
    with HostWaits() as waits:
        with on_host():
            VALUES[0].item()
        VALUES[1].item()
    assert len(waits.found) == 1
    VALUES[2].item()
    assert len(waits.found) == 1, "nothing is noted afterwards"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_pytorch_says_what_waits() -> None:
    values, mask = VALUES.cuda(), MASK.cuda()
    weights = torch.ones(3, device="cuda", requires_grad=True)
    with HostWaits("cuda") as waits:
        values + 1
        values[mask]
        weights[mask].sum().backward()
    assert len(waits.found) == 3
    assert all("test_host_waits.py:" in wait.place for wait in waits.found)
    with HostWaits("cuda") as waits:
        values[torch.tensor([0, 2]).pin_memory().to("cuda", non_blocking=True)]
    assert waits.found == []
