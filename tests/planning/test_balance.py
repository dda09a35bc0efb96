"""Cuts that give every stage the same work."""

import itertools
import random
import re
from pathlib import Path

import pytest
from ranks import ranks
from tiny import write_model, write_rows

from lopt_pp.planning.balance import balance
from lopt_pp.planning.costs import Costs


def random_costs(draw: random.Random, depth: int) -> Costs:
    layers = tuple(draw.uniform(1, 3) for _ in range(depth))
    return Costs(layers, layers, draw.uniform(0, 3), draw.uniform(0, 1), draw.uniform(0, 8))


@pytest.mark.parametrize("seed", range(10))
def test_no_other_cuts_have_a_shorter_longest_stage(seed: int) -> None:
    draw = random.Random(seed)
    depth, num_stages = draw.randint(4, 9), draw.randint(1, 4)
    costs = random_costs(draw, depth)

    def longest(cuts: tuple[int, ...]) -> float:
        edges = [0, *cuts, depth]
        return max(costs.of(start, stop, int(stop < depth)) for start, stop in itertools.pairwise(edges))

    specs = balance(costs, [1] * num_stages)
    best = min(map(longest, itertools.combinations(range(1, depth), num_stages - 1)))
    assert longest(tuple(spec.start for spec in specs[1:])) == best
    assert [spec.stage for spec in specs] == list(range(num_stages)) and specs[-1].stop == depth


def test_the_busiest_process_comes_before_the_busiest_stage() -> None:
    """Of three stages on two processes, the one that is alone gets as much as the two together."""
    costs = Costs((1.0,) * 12, (1.0,) * 12, 0.0, 0.0, 0.0)
    assert [spec.stop - spec.start for spec in balance(costs, [1, 2])] == [6, 3, 3]
    assert [spec.stop - spec.start for spec in balance(costs, [3])] == [4, 4, 4]


def test_each_process_gets_a_layer_for_each_of_its_stages() -> None:
    costs = Costs((1.0,) * 5, (1.0,) * 5, 0.0, 0.0, 100.0)
    assert [spec.stop - spec.start for spec in balance(costs, [2, 3])] == [1, 1, 1, 1, 1]


def test_a_stage_that_only_runs_forward_gets_more_layers() -> None:
    costs = Costs((3.0,) * 8, (1.0,) * 8, 0.0, 0.0, 0.0)
    assert [spec.stop - spec.start for spec in balance(costs, [1, 1])] == [6, 2]


@pytest.mark.slow
def test_auto_says_what_it_chose_and_trains_on_it(tmp_path: Path) -> None:
    """All processes take the cuts that rank 0 has found, though the timing differs from run to run."""
    model = write_model(tmp_path / "model", vocab_size=3000, num_hidden_layers=8)
    rows = write_rows(tmp_path / "rows.jsonl")
    flags = f"--model_name_or_path {model} --train_file {rows} --output_dir {tmp_path / 'out'} --max_steps 2"
    with ranks(tmp_path, *[[*flags.split(), "--split", "auto"]] * 2) as started:
        for rank in started:
            assert rank.status(120) == 0, rank.text
    log = started[0].text
    assert re.search(r"--split auto: of a microbatch of \d+ x \d+ tokens, a layer [\d.]+ ms, the embedding", log)
    assert re.search(r"--split auto: stages of [\d.]+, [\d.]+ ms", log)
    cut = re.search(r"cut into layers 0-(\d); layers (\d)-7", log)
    assert cut and int(cut[1]) + 1 == int(cut[2])
