"""How fast the boundaries are, and how much faster several processes are than one."""

from pathlib import Path
from typing import Any

from lopt_pp.checks.inputs import write_model, write_rows
from lopt_pp.checks.result import CheckFailed, Figures, NotHere
from lopt_pp.checks.session import Session
from lopt_pp.checks.training import records, train, train_alone

LEAST_OVERLAP = 0.3
"""Below that a transfer holds up the computation, on GPUs of their own."""

SPEED_INPUTS = "speed"
"""The folder with a larger model, and rows of equal length."""


def links(session: Session) -> Figures:
    """Latency, bandwidth and overlap of each boundary; those of replicas at the same time, as in a run."""
    topology = session.topology
    if topology.num_processes == 1:
        raise NotHere("the layout has no boundary between processes")
    arguments = [str(topology.num_stages), str(topology.num_replicas), session.backend]
    ran = session.run("links", arguments, entry="measure_links").succeeded()
    figures: Figures = {}
    for found in ran.results:
        for stages, link in found.items():
            # Of the replicas, and of both ends, the worst.
            for name, value, worse in (
                (f"{stages} GB/s", link["bandwidth"] / 1e9, min),
                (f"{stages} latency in ms", link["latency"] * 1e3, max),
                (f"{stages} overlap", link["overlap"], min),
            ):
                figures[name] = worse(value, float(figures.get(name, value)))
    slow = [name for name, value in figures.items() if name.endswith("overlap") and float(value) < LEAST_OVERLAP]
    if slow and session.backend == "nccl" and not session.shares_gpus:
        raise CheckFailed(
            f"{slow[0]} is {figures[slow[0]]:.2f}: transfers and computation take turns, and each step waits for its "
            f"transfers. Leave CUDA_DEVICE_MAX_CONNECTIONS and CUDA_LAUNCH_BLOCKING unset"
        )
    return figures


def throughput(session: Session) -> Figures:
    """Tokens per second of all processes, and of one that does the same."""
    on_gpu = session.backend == "nccl"

    def write() -> None:
        inputs = session.folder / SPEED_INPUTS
        per_stage, hidden, terms = (4, 1024, 80) if on_gpu else (2, 128, 20)
        layers = per_stage * session.topology.num_stages
        write_model(inputs / "model", layers, hidden, positions=8 * terms)
        write_rows(inputs / "rows.jsonl", 64 * session.topology.num_replicas, (terms, terms))

    session.leader_says(write)
    inputs = session.folder / SPEED_INPUTS
    more = ["--model_name_or_path", str(inputs / "model"), "--train_file", str(inputs / "rows.jsonl")]
    more += ["--max_steps", "12" if on_gpu else "8", "--per_device_train_batch_size", "8" if on_gpu else "4"]
    more += ["--dtype", "bfloat16"] if on_gpu else []
    together = train(session, "speed-together", session.topology, *more, "--gradient_accumulation_steps", "4")
    together.succeeded()
    alone = train_alone(session, session.topology, *more, accumulation=4, name="speed-alone")
    return session.leader_says(lambda: _compare(session, together.folder / "out", alone))


def _compare(session: Session, together: Path, alone: Path) -> Figures:
    number, last = session.processes, session.topology.num_stages - 1
    fast, slow = (_tokens_per_second(records(out), last) for out in (together, alone))
    if fast < slow and session.backend == "nccl" and not session.shares_gpus:
        raise CheckFailed(
            f"{number} processes train {fast:.0f} tokens/s, and one trains {slow:.0f}: the links are too slow (see "
            f"their GB/s), or something else uses the GPUs (nvidia-smi)"
        )
    return {f"tokens/s of {number} processes": round(fast), "of one": round(slow), "times": fast / slow}


def _tokens_per_second(steps: list[dict[str, Any]], stage: int) -> float:
    """Of the second half of a run, on its last stage."""
    own = [record for record in steps if record["stage"] == stage]
    late = own[len(own) // 2 :]
    return sum(record["num_tokens"] for record in late) / sum(record["step_seconds"] for record in late)
