"""Makes the microbatches of the next step while a step runs."""

from concurrent.futures import Future, ThreadPoolExecutor

from lopt_pp.data.microbatch import Microbatch
from lopt_pp.data.sampler import MicrobatchSampler


class MicrobatchesAhead:
    """The microbatches of each step; where a GPU computes, made and pinned in a thread while it runs the step before.

    A host that computes itself has nothing to gain from a thread, which would take its turns from the computing.

    Args:
        sampler: makes them.
        num_steps: of the run: none is made beyond its last step.
        in_thread: whether a thread makes them; they are in pinned memory then, if `pins`.
        pins: whether to pin what the thread makes.
    """

    def __init__(self, sampler: MicrobatchSampler, num_steps: int, *, in_thread: bool, pins: bool = True) -> None:
        self._sampler, self._num_steps, self._pins = sampler, num_steps, pins
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="collate") if in_thread else None
        self._begun: tuple[int, Future[list[Microbatch]]] | None = None

    def microbatches(self, step: int) -> list[Microbatch]:
        """The replica's microbatches of a step, on the CPU.

        Raises:
            UnusableRowsError: the step's rows cannot be used, whatever the step before was.
        """
        if self._thread is None:
            return self._sampler.microbatches(step)
        if self._begun is None or self._begun[0] != step:
            self._begin(step)
        assert self._begun is not None
        batches = self._begun[1].result()
        if step + 1 < self._num_steps:
            self._begin(step + 1)
        return batches

    def _begin(self, step: int) -> None:
        assert self._thread is not None
        self._begun = step, self._thread.submit(self._make, step)

    def _make(self, step: int) -> list[Microbatch]:
        batches = self._sampler.microbatches(step)
        return [batch.pin_memory() for batch in batches] if self._pins else batches
