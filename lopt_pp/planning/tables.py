"""A plan as tables for people."""

from collections.abc import Sequence
from typing import Any

GIB = 2**30

_DEVICES = {"cuda": "GPUs", "cpu": "CPUs"}
"""What --device calls them, in words."""

_PARTS = ("weights", "gradients", "optimizer", "activations", "gathered", "queue")


def describe(plan: dict[str, Any]) -> str:
    """The text of what `lopt_pp.planning.plan.plan` gives."""
    lines = [*_heading(plan), "", *_local(plan), "", *_end_to_end(plan), "", *_balance(plan)]
    if plan["memory_per_device"] is not None:
        lines += ["", *_fit(plan)]
    return "\n".join(lines)


def _heading(plan: dict[str, Any]) -> list[str]:
    checkpointing = ", gradient checkpointing" if plan["gradient_checkpointing"] else ""
    replicas = f" x {plan['num_replicas']} replicas, sharding {plan['sharding']}" if plan["num_replicas"] > 1 else ""
    return [
        f"{plan['model']}, {plan['num_layers']} layers, on {_DEVICES[plan['device']]} (--device {plan['device']}): "
        f"{_count(plan['num_stages'], 'stage')} in {_count(plan['num_processes'], 'process')}{replicas}",
        f"{_count(plan['accumulation'], 'microbatch')} of {plan['rows']} x {plan['tokens']} tokens in a step, "
        f"{plan['dtype']}{checkpointing}",
    ]


def _count(number: int, what: str) -> str:
    ending = "" if number == 1 else "es" if what.endswith(("s", "h")) else "s"
    return f"{number} {what}{ending}"


def _local(plan: dict[str, Any]) -> list[str]:
    name = f"Local learning ({plan['local_objective']})"
    if plan["local_objective"] == "none":
        name = "The last block learns, the others only run forward"
    message = plan["boundary"]["bytes_per_microbatch"]
    crossing = [message] * (len(plan["stages"]) - 1) + [0]
    lines = [
        f"{name}, GiB at the fullest moment of each {'stage' if len(plan['stages']) > 1 else 'process'}",
        *_table(plan, plan["stages"], crossing),
    ]
    if len(plan["processes"]) < len(plan["stages"]):
        lines += ["", "Stages of one process take turns; GiB of each process", *_table(plan, plan["processes"])]
    if rate := plan["boundary"]["bytes_per_operation"]:
        lines.append(
            f"a boundary between processes carries {message / 1e6:.1f} MB per microbatch, one way: {1e6 * rate:.2f} "
            f"MB/s for each TFLOP/s that the busiest process reaches"
        )
    return lines


def _end_to_end(plan: dict[str, Any]) -> list[str]:
    one, pipeline = plan["end_to_end"]["one_process"], plan["end_to_end"]["pipeline"]
    lines = ["End to end in one process, GiB", *_table(plan, [one])]
    if pipeline:
        # What goes forward comes back as a gradient, so both are said.
        message = plan["boundary"]["bytes_per_microbatch"]
        crossing = [message] * (len(pipeline) - 1) + [0]
        held = min(len(pipeline), plan["accumulation"])
        lines += [
            "",
            f"End to end as a 1F1B pipeline, {_count(held, 'microbatch')} under way on the first stage, GiB; as many "
            f"bytes come back",
            *_table(plan, pipeline, crossing),
        ]
    return lines


def _table(plan: dict[str, Any], entries: Sequence[dict[str, Any]], crossing: Sequence[int] = ()) -> list[str]:
    """Lines with every column as wide as its widest entry."""
    parts = [part for part in _PARTS if any(entry["memory"][part] for entry in entries)]
    head = ["stage", "layers", "10^6 parameters", *parts, "total"]
    if plan["memory_per_device"] is not None:
        head.append(f"fits {plan['memory_per_device'] / GIB:g}")
    head += ["10^12 operations", *(["MB to the next"] if any(crossing) else [])]
    rows = []
    for position, entry in enumerate(entries):
        row = [
            ", ".join(map(str, entry["stages"])),
            ", ".join(f"{first}-{last}" for first, last in entry["layers"]),
            f"{entry['parameters'] / 1e6:.1f}",
            *(gib(entry["memory"][part]) for part in parts),
            gib(entry["total"]),
        ]
        if entry["fits"] is not None:
            row.append(_verdict(entry, plan["memory_per_device"]))
        row.append(f"{entry['operations'] / 1e12:.3f}")
        if any(crossing):
            row.append(f"{crossing[position] / 1e6:.1f}" if crossing[position] else "-")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]


def gib(size: float) -> str:
    """In GiB, with three digits."""
    return f"{size / GIB:.{2 if size < 10 * GIB else 1}f}"


def _verdict(entry: dict[str, Any], memory: float) -> str:
    if entry["fits"]:
        return "yes"
    return "tight" if entry["total"] <= memory else "no"


def _balance(plan: dict[str, Any]) -> list[str]:
    if plan["num_stages"] == 1:
        return ["one stage: nothing to balance"]
    balanced = plan["balanced"]
    cuts = ",".join(map(str, balanced["first_layers"]))
    best, now = balanced["operations"] / 1e12, balanced["operations_as_planned"] / 1e12
    return [
        f"balanced by operations: --split {cuts}, busiest process {best:.3f} x 10^12 operations a microbatch; as "
        f"planned {now:.3f} (--split auto goes by timings)"
    ]


def _fit(plan: dict[str, Any]) -> list[str]:
    memory = plan["memory_per_device"]
    fullest = max(entry["total"] for entry in plan["processes"])
    share = f"the fullest process holds {gib(fullest)} of {memory / GIB:g} GiB"
    if plan["fits"]:
        return [f"fits: {share}; a tenth is left for what is not counted (CUDA context, NCCL, the allocator's rest)"]
    lines = [f"does not fit with a tenth to spare: {share}. Each on top of the others:"]
    lines += [f"  {remedy['flags']}: {gib(remedy['total'])} GiB ({remedy['price']})" for remedy in plan["remedies"]]
    lines.append("with these it fits" if plan["fits_with_remedies"] else "nothing that was tried makes it fit")
    return lines
