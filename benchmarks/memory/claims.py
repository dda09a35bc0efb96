"""What comes out of the memory benchmark: what is to hold of its measurements, and how they are shown."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from benchmarks.memory.layouts import Case, ProcessMemory

MIB = 2**20
Results = dict[Case, list[ProcessMemory]]
"""What the processes of each case hold, by rank."""


@dataclass(frozen=True)
class Claim:
    """That stages at work hold no more than others, to which they are compared.

    Attributes:
        model: whose stages.
        name: what the stages have more of than those that they are compared to.
        pairs: number of comparisons.
        ratio: of the activations without the queue, where it comes closest to its limit.
        at_most: that limit.
        saved: the highest ratio of the bytes that autograd keeps. More than 1 is too much.
    """

    model: str
    name: str
    pairs: int
    ratio: float
    at_most: float
    saved: float

    @property
    def holds(self) -> bool:
        return self.ratio <= self.at_most and self.saved <= 1


def claims_of(results: Results, margin: float, slack: float) -> list[Claim]:
    """This project's stages compared to those with one microbatch per step, the shallowest queue, half as many stages.

    Args:
        results: the measurements.
        margin: that resident memory may differ by, of itself.
        slack: and in bytes.
    """
    plain = [case for case in results if case.method == "LoPT-PP" and case.is_plain]
    shallowest = min((case.queue_depth for case in plain), default=1)
    compared: dict[tuple[str, str], list[tuple[ProcessMemory, ProcessMemory]]] = {}

    def compare(name: str, case: Case, other: Case, largest: bool = False) -> None:
        if other == case or other not in results:
            return
        pairs = zip(results[case], results[other], strict=True) if not largest else [(most(case), most(other))]
        compared.setdefault((case.model, name), []).extend(pairs)

    def most(case: Case) -> ProcessMemory:
        return max(results[case], key=lambda memory: memory.at_work)

    for case in plain:
        compare("microbatches per step", case, replace(case, microbatches=1))
        if case.has_queues:
            compare("messages in the queue", case, replace(case, queue_depth=shallowest))
        if case.stages > 2:
            half = replace(case, stages=case.stages // 2, processes=-(-case.processes // 2))
            compare("stages", case, half, largest=True)
    return [_claim(*key, pairs, margin, slack) for key, pairs in compared.items()]


def _claim(
    model: str, name: str, pairs: list[tuple[ProcessMemory, ProcessMemory]], margin: float, slack: float
) -> Claim:
    limits = [(this.at_work / that.at_work, 1 + margin + slack / that.at_work) for this, that in pairs]
    ratio, at_most = max(limits, key=lambda limit: limit[0] / limit[1])
    saved = max((this.saved or 0) / (that.saved or 1) for this, that in pairs)
    return Claim(model, name, len(pairs), ratio, at_most, saved)


def claims_table(claims: Iterable[Claim]) -> Iterator[str]:
    yield f"{'model':<14}{'at work, with more':<24}{'pairs':>6}{'ratio':>9}{'at most':>9}{'saved':>9}"
    for claim in claims:
        yield (
            f"{claim.model:<14}{claim.name:<24}{claim.pairs:>6}{claim.ratio:>9.3f}{claim.at_most:>9.3f}"
            f"{claim.saved:>9.3f}  {'no more' if claim.holds else 'MORE'}"
        )


def comparison_table(cases: Iterable[Case], results: Results) -> Iterator[str]:
    """Every process."""
    names = ("peak", "imports", "model", "other", "activations", "queue", "saved")
    yield f"{'layout':<24}{'M':>3}{'rank':>5}" + "".join(f"{name:>12}" for name in names)
    for case in cases:
        for rank, memory in enumerate(results.get(case, [])):
            head = f"{case.layout:<24}{case.microbatches:>3}" if rank == 0 else " " * 27
            yield f"{head}{rank:>5}" + "".join(_mib(getattr(memory, name)) for name in names)


def growth_table(cases: Iterable[Case], results: Results) -> Iterator[str]:
    """Of each layout the process with the most at work."""
    names = ("activations", "queue", "at work", "saved")
    yield f"{'stages':<7}{'processes':>9}{'M':>4}{'depth':>6}" + "".join(f"{name:>12}" for name in names)
    for case in (case for case in cases if case in results):
        memory = max(results[case], key=lambda memory: memory.at_work)
        depth = case.queue_depth if case.has_queues else "-"
        head = f"{case.stages:<7}{case.processes:>9}{case.microbatches:>4}{depth:>6}"
        yield head + "".join(map(_mib, (memory.activations, memory.queue, memory.at_work, memory.saved)))


def savings_table(cases: Iterable[Case], results: Results) -> Iterator[str]:
    """Of one process."""
    yield f"{'dtype':<15}{'checkpointing':<15}" + "".join(f"{name:>12}" for name in ("peak", "model", "activations"))
    for case in (case for case in cases if case in results):
        (memory,) = results[case]
        head = f"{case.dtype:<15}{'yes' if case.gradient_checkpointing else 'no':<15}"
        yield head + "".join(map(_mib, (memory.peak, memory.model, memory.activations)))


def _mib(value: int | None) -> str:
    return f"{'-' if value is None else f'{value / MIB:.1f}':>12}"
