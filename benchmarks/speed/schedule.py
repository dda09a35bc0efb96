"""How much of a stage's time the schedule lets it compute, with k stages in k processes on one machine.

    python -m benchmarks.speed.schedule [--quick] [--output schedule.json]

Every stage's compute is a fixed sleep: forward, backward twice as long, an optimizer step half as long. So sixteen
stages run truly side by side on a small machine, all stages are equally long, and any time beyond the sleeps is the
schedule's or the transport's. Ours is the training loop and the stream that train a model, over gloo; beside it, in the
same processes with the same sleeps and messages, PyTorch's 1F1B, whose gradients travel back. (PyTorch's 1F1B refuses
fewer microbatches than stages; GPipe, marked *, is used there, with the same bubble.)

Columns, for k stages and M microbatches per optimizer step:

  ours    efficiency: what the stage had to sleep / the wall time from its first receive to the end of its last step;
          of the least efficient stage. From its first receive, because the fill is paid once in a run and a run may be
          as long as one likes; every later wait of any kind counts.
  fill    seconds until the last stage has received its first hidden states, once in a run.
  ideal   the same for (k - 1) forwards with nothing between them.
  peer    the same efficiency for PyTorch's schedule, from the end of its first step (set-up) to the end of its last.
  bound   what that schedule could reach: M microbatches and an optimizer step of (M + k - 1) and an optimizer step.
  gain    ours / peer: steps per second, once the pipeline is full.

Sleeps overshoot, by a tenth of a millisecond on a quiet machine; on a busy one each message may wait milliseconds for a
core, and the stages of a pipeline add up each other's delays. What a busy machine shows is therefore a lower bound; as
root, `chrt --rr 1 python -m benchmarks.speed.schedule` comes close to a quiet one, and disturbs others little.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

# Before PyTorch: one thread in each process.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.helpers import machine
from benchmarks.helpers.simulated_stages import RUNS, Load, Times, peer_name
from benchmarks.helpers.workers import Workers, free_port
from lopt_pp.distributed.world import World

REACH = 0.97


def work(world: World, method: str, *arguments: Any) -> Times | None:
    return RUNS[method](world, *arguments)


def measure(workers: Workers, k: int, load: Load, steps: int, peer_steps: int, queue_depth: int) -> dict[str, Any]:
    """Both schedules on `k` stages."""
    ours = [times for times in workers.run("ours", k, load, steps, queue_depth) if times is not None]
    peer = [times for times in workers.run("peer", k, load, peer_steps + 1) if times is not None]
    asleep = steps * load.step
    stages = [
        {
            "efficiency": asleep / (times["ended"] - times["received"][0]),
            # The same without what the sleeps themselves were longer than asked for.
            "computing": sum(times["seconds"][f"{phase}_seconds"] for phase in ("forward", "backward", "optimizer"))
            / (times["ended"] - times["received"][0]),
        }
        for times in ours
    ]
    efficiency = min(stage["efficiency"] for stage in stages)
    peer_efficiency = min(peer_steps * load.step / (times["ended"][-1] - times["ended"][0]) for times in peer)
    bubble = (k - 1) * (load.forward + load.backward)
    return {
        "stages": k,
        "microbatches": load.microbatches,
        "steps": steps,
        "efficiency": efficiency,
        "by_stage": stages,
        "reached": efficiency >= REACH,
        "fill_seconds": ours[-1]["received"][0] - ours[0]["received"][0],
        "ideal_fill_seconds": (k - 1) * load.forward,
        "efficiency_of_the_whole_run": asleep / (max(times["ended"] for times in ours) - ours[0]["received"][0]),
        "peer": peer_name(k, load.microbatches),
        "peer_steps": peer_steps,
        "peer_efficiency": peer_efficiency,
        "peer_bound": load.step / (load.step + bubble),
        "gain": efficiency / peer_efficiency,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8, 16], metavar="K")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[1, 2, 4, 8], metavar="M", help="per step")
    parser.add_argument(
        "--forward", type=float, default=0.03, metavar="SECONDS", help="a forward's sleep (default: %(default)s)"
    )
    parser.add_argument(
        "--run", type=int, default=40, metavar="N", help="microbatches in each run of ours (default: %(default)s)"
    )
    parser.add_argument(
        "--peer_steps", type=int, default=3, metavar="N", help="steps of the peer that count (default: %(default)s)"
    )
    parser.add_argument("--queue_depth", type=int, default=2, help="of the stream (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 and 4 stages, 1 and 4 microbatches, short runs")
    parser.add_argument("--output", type=Path, default=Path("schedule.json"), help="(default: %(default)s)")
    flags = parser.parse_args()
    if flags.quick:
        flags.stages, flags.microbatches, flags.run, flags.peer_steps = [2, 4], [1, 4], 16, 1

    facts = machine.describe_machine(torch.device("cpu"))
    print(f"{'k':>3} {'M':>3} {'ours':>7} {'fill':>7} {'ideal':>7} {'peer':>8} {'bound':>7} {'gain':>6}", flush=True)
    runs = []
    with Workers(max(flags.stages), ("localhost", free_port()), "lo", work) as workers:
        for k in flags.stages:
            for microbatches in flags.microbatches:
                load = Load(flags.forward, 2 * flags.forward, flags.forward / 2, microbatches, (1, 64, 64))
                steps = max(flags.run // microbatches, 2)
                runs.append(run := measure(workers, k, load, steps, flags.peer_steps, flags.queue_depth))
                mark = "*" if run["peer"] == "GPipe" else " "
                print(
                    f"{k:>3} {microbatches:>3} {run['efficiency']:>7.1%} {run['fill_seconds']:>7.3f} "
                    f"{run['ideal_fill_seconds']:>7.3f} {run['peer_efficiency']:>7.1%}{mark} {run['peer_bound']:>7.1%} "
                    f"{run['gain']:>6.2f}",
                    flush=True,
                )
    missed = [f"k={run['stages']} M={run['microbatches']}" for run in runs if not run["reached"]]
    print(f"efficiency of at least {REACH:.0%}: {'not at ' + ', '.join(missed) if missed else 'everywhere'}")
    print(machine.one_line(facts))
    sleeps = {"forward": flags.forward, "backward": 2 * flags.forward, "optimizer": flags.forward / 2}
    result = {"machine": facts, "sleeps": sleeps, "shape": [1, 64, 64], "queue_depth": flags.queue_depth, "runs": runs}
    flags.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
