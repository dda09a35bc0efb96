"""What 1F1B and local learning need where rows are of unequal lengths, by arithmetic: nothing is run.

    python -m benchmarks.speed.unequal_rows_arithmetic

Two equal stages; a microbatch takes time in proportion to its tokens, padding included, and backward twice as long as
forward; transfers and optimizer steps take none. The rows are those of `benchmarks.speed.unequal_rows`, in ten random
orders. Columns, for M microbatches of so many rows per step (or of one pack of at most 512 tokens):

  own shapes    tokens computed for each real one where a microbatch is padded to its own longest row.
  alike         the same where all microbatches of a step are padded alike.
  1F1B          time of a step padded alike / with own shapes.
  local         time of a step of 1F1B with own shapes / of a pipeline by local learning, once that is full.
"""

import argparse
from collections.abc import Sequence

from benchmarks.helpers.own_shapes import one_forward_one_backward
from benchmarks.speed.unequal_rows_process import MAX_LENGTH, rows_of_gsm8k
from lopt_pp.data import MicrobatchSampler
from lopt_pp.data.packed_rows import PackedRows

FORWARD, BACKWARD = 1, 2
ORDERS = 10


def seconds_of_1f1b(costs: Sequence[float], num_stages: int = 2) -> float:
    """Of a step, from its first forward to its last backward.

    Args:
        costs: seconds of each microbatch's forward on each stage; its backward takes twice as long.
        num_stages: of the pipeline.
    """
    ahead = [list(one_forward_one_backward(stage, num_stages, len(costs))) for stage in range(num_stages)]
    free, ended = [0.0] * num_stages, dict[tuple[int, int, bool], float]()
    while any(ahead):
        for stage, work in enumerate(ahead):
            while work:
                number, goes_back = work[0]
                before = stage + 1 if goes_back else stage - 1
                if 0 <= before < num_stages and (before, number, goes_back) not in ended:
                    break  # What it needs has not been made yet.
                begin = max(free[stage], ended.get((before, number, goes_back), 0.0))
                free[stage] = begin + costs[number] * (BACKWARD if goes_back else FORWARD)
                ended[stage, number, goes_back] = free[stage]
                del work[0]
    return max(free)


def figures(sampler: MicrobatchSampler, steps: int) -> dict[str, float]:
    """Sums over steps: tokens that are real, or computed in each way, and the time that each needs."""
    sums = dict.fromkeys(("real", "own", "alike", "1F1B own", "1F1B alike", "local"), 0.0)
    for step in range(steps):
        costs = [float(rows * tokens) for rows, tokens in sampler.shapes(step)]
        # As `--method e2e` pads: the most rows and the most tokens of any microbatch.
        padded = [float(max(r for r, _ in sampler.shapes(step)) * max(t for _, t in sampler.shapes(step)))] * len(costs)
        sums["real"] += sampler.counts(step).num_tokens
        sums["own"] += sum(costs)
        sums["alike"] += sum(padded)
        sums["1F1B own"] += seconds_of_1f1b(costs)
        sums["1F1B alike"] += seconds_of_1f1b(padded)
        sums["local"] += (FORWARD + BACKWARD) * sum(costs)
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8, 16], metavar="M", help="per step")
    flags = parser.parse_args()
    single = rows_of_gsm8k(4096)
    packed = PackedRows(single, MAX_LENGTH)
    print("| rows of a microbatch | M | own shapes | alike | 1F1B | local |\n" + "| --- " * 6 + "|")
    for name, rows, size in (("2", single, 2), ("1", single, 1), ("a pack", packed, 1)):
        for number in flags.microbatches:
            sums = dict.fromkeys(("real", "own", "alike", "1F1B own", "1F1B alike", "local"), 0.0)
            for seed in range(ORDERS):
                sampler = MicrobatchSampler(
                    rows,
                    per_device_train_batch_size=size,
                    gradient_accumulation_steps=number,
                    shuffle=True,
                    seed=seed,
                    pad_token_id=0,
                    keep_apart=rows is packed,
                )
                # Whole steps only.
                own = figures(sampler, len(rows) // (number * size))
                sums = {key: value + own[key] for key, value in sums.items()}
            print(
                f"| {name} | {number} | {sums['own'] / sums['real']:.2f} | {sums['alike'] / sums['real']:.2f} | "
                f"{sums['1F1B alike'] / sums['1F1B own']:.2f} | {sums['1F1B own'] / sums['local']:.2f} |"
            )


if __name__ == "__main__":
    main()
