"""Whether the host waits for its GPU within a step: then the GPU has nothing to do until the host has gone on."""

from collections import Counter

from lopt_pp.checks.result import CheckFailed, Figures
from lopt_pp.checks.session import Session
from lopt_pp.checks.training import flags_of


def waits(session: Session) -> Figures:
    """No wait from a step's first microbatch to its optimizer step, but in the first steps, which prepare things.

    On CPUs the operators are counted that would wait for a GPU.
    """
    out = session.folder / "waits" / "out"
    flags = flags_of(session, out, session.topology, "--gradient_accumulation_steps", "4")
    ran = session.run("waits", flags, entry="train_counting_waits").succeeded()
    microbatches = sum(found["microbatches"] for found in ran.results)
    places: Counter[str] = Counter()
    for found in ran.results:
        places.update(found["places"])
    if microbatches == 0:
        raise CheckFailed("no microbatch was looked at; report it")
    if places:
        place, number = places.most_common(1)[0]
        raise CheckFailed(
            f"the host waits for the GPU {places.total() / microbatches:.2g} times a microbatch, mostly at {place} "
            f"({number} times in {microbatches} microbatches): training is right, and slower than need be; report it"
        )
    return {"waits in": f"{microbatches} microbatches: none"}
