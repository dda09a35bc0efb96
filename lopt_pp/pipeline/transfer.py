"""A message on its way, and how the host waits for it."""

import math
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

_SHORTEST, _LONGEST = 20e-6, 500e-6
"""Seconds between two looks at a message that is polled."""


@dataclass(frozen=True)
class Transfer:
    """A message that a process sends or receives.

    Attributes:
        work: what `torch.distributed` has made of it.
        is_polled: whether the host has to look whether it is done, as over NCCL; over gloo it can sleep until it is.
    """

    work: dist.Work
    is_polled: bool

    def wait(self, timeout: float) -> None:
        """Waits on the host until the message has left or arrived; what the stream computes next comes after it.

        Args:
            timeout: seconds from now, whenever the message was posted.

        Raises:
            TimeoutError: it takes longer.
            RuntimeError: it failed.
        """
        begun = time.monotonic()
        if self.is_polled:
            self._poll(begun, timeout)
            # Raises if it failed. While it was on its way, this would have made the current CUDA stream wait: all that
            # another thread then copies on that stream, such as the last good weights, would wait for it too.
            self.work.wait()
            return
        try:
            # Gloo takes 0 ms for no limit, and says that a message is done only after this.
            self.work.wait(timedelta(milliseconds=math.ceil(timeout * 1e3)))
        except RuntimeError as error:
            if time.monotonic() - begun >= timeout:
                raise TimeoutError from error
            raise

    def _poll(self, begun: float, timeout: float) -> None:
        while not self.work.is_completed():
            waited = time.monotonic() - begun
            if waited >= timeout:
                raise TimeoutError
            # Adds little to a short wait, and costs little of a core in a long one.
            time.sleep(min(max(waited / 16, _SHORTEST), _LONGEST, timeout - waited))
