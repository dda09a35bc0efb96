"""The messages that the two processes of tests/pipeline/test_stream.py exchange."""

import torch

from lopt_pp.config.topology import Topology
from lopt_pp.distributed.world import World
from lopt_pp.pipeline.boundary import Boundary, boundaries
from lopt_pp.pipeline.messages import Header, dtype_code

HIDDEN = 6


def headers(count: int) -> list[Header]:
    """Of messages of different shapes and dtypes, two to a step."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [
        Header(number // 2, number % 2, 1 + number % 3, 1 + 7 * number % 11, HIDDEN, number % len(dtypes))
        for number in range(count)
    ]


def payload(header: Header) -> torch.Tensor:
    """Any bits at all, infinities and NaNs among them; the same in both processes."""
    dtype = {dtype_code(kind): kind for kind in (torch.float32, torch.bfloat16, torch.float16)}[header.dtype]
    generator = torch.Generator().manual_seed(2 * header.step + header.microbatch)
    size = (*header.shape[:-1], HIDDEN * dtype.itemsize)
    return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).view(dtype)


def same(arrived: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two messages are the same bit for bit."""
    alike = arrived.shape == right.shape and arrived.dtype == right.dtype
    return alike and torch.equal(arrived.view(torch.uint8), right.view(torch.uint8))


def fresh(world: World, timeout: float = 20) -> Boundary:
    """A boundary of its own for each test, since one that has failed is of no more use."""
    return boundaries(world, Topology(2, 2), timeout)[0]
