"""How large a comparison is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Form:
    """The size of a comparison.

    Attributes:
        steps: of the optimizer in a trial.
        rates: the grid's learning rates.
        seeds: of the chosen settings.
        train, validation, test: numbers of questions; no trial at equal wall time comes to the end of the first.
        kept_rows: of each text that is to be kept.
        max_length: of a row in tokens.
        batch: rows of a microbatch.
        accumulation: microbatches of a step.
        timed_steps: of the measurement of speed.
        flags: of the program for every run, besides.
        local_shares: what the learning rate of the earlier blocks is tried at, as shares of the last one's.
        head_rate: the local heads' learning rate, as a multiple of the last block's: what is new, or put together anew,
            has to settle before its block moves.
        head_warmup: share of the steps in which local heads learn alone.
    """

    steps: int
    rates: tuple[float, ...]
    seeds: int
    train: int
    validation: int
    test: int
    kept_rows: int
    max_length: int
    batch: int
    accumulation: int
    timed_steps: int
    flags: tuple[str, ...] = ()
    local_shares: tuple[float, ...] = (1.0, 0.1)
    head_rate: float = 5
    head_warmup: float = 0.25


FORMS = {
    # The tokenizer of a random model has few words: a row has many tokens.
    "tiny": Form(
        steps=3,
        rates=(1e-2,),
        seeds=1,
        train=24,
        validation=6,
        test=12,
        kept_rows=4,
        max_length=2048,
        batch=2,
        accumulation=1,
        timed_steps=2,
    ),
    "cpu": Form(
        steps=50,
        rates=(5e-5, 1e-4, 2e-4),
        seeds=3,
        train=1600,
        validation=60,
        test=120,
        kept_rows=20,
        max_length=512,
        batch=2,
        accumulation=4,
        timed_steps=8,
    ),
    "gpu": Form(
        steps=400,
        rates=(5e-6, 1e-5, 2e-5, 5e-5, 1e-4),
        seeds=3,
        train=51200,
        validation=300,
        test=1200,
        kept_rows=1000,
        max_length=512,
        batch=8,
        accumulation=4,
        timed_steps=20,
        flags=("--dtype", "bfloat16"),
    ),
}
