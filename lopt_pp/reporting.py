"""Brings the records of all stages together: one file, one progress bar, one summary.

Every stage puts its records into the run's key-value store and goes on; a thread of rank 0 takes them out. Nothing here
is on the training path.
"""

import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed import Store
from tqdm import tqdm

from lopt_pp.metrics import COMPUTE_PHASES

logger = logging.getLogger(__name__)

_BAR = "|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
"""What a terminal of 80 columns has room for."""


def post(store: Store, record: dict[str, Any]) -> None:
    """Puts a stage's record of a step where rank 0 finds it."""
    store.set(f"record/{record['stage']}/{record['step']}", json.dumps(record))


class Collector:
    """Takes the records of all stages, in a thread of rank 0.

    Writes every record to `metrics.jsonl`, moves the progress bar (on a terminal), logs every `logging_steps` steps.

    Args:
        store: a connection to the run's store for this thread alone, with a long timeout.
        path: of `metrics.jsonl`.
        loss_names: of each stage, in order.
        num_steps: of the run.
        logging_steps: steps between log lines.
    """

    def __init__(self, store: Store, path: Path, loss_names: Sequence[str], num_steps: int, logging_steps: int) -> None:
        self._store = store
        self._path = path
        self._loss_names = loss_names
        self._num_steps = num_steps
        self._logging_steps = logging_steps
        self._begun = time.perf_counter()
        self.records: list[list[dict[str, Any]]] = []
        """By step, the records of all stages."""
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        # disable=None: no bar where standard error is no terminal.
        with (
            self._path.open("w", encoding="utf-8") as file,
            tqdm(total=self._num_steps, disable=None, bar_format=_BAR) as bar,
        ):
            for step in range(1, self._num_steps + 1):
                records = [self._take(f"record/{stage}/{step}") for stage in range(len(self._loss_names))]
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
                self.records.append(records)
                bar.set_postfix_str(self._short_status(records), refresh=False)
                bar.update()
                if step % self._logging_steps == 0 or step == self._num_steps:
                    with tqdm.external_write_mode():
                        logger.info("step %d/%d: %s", step, self._num_steps, self._status(records))

    def _take(self, key: str) -> dict[str, Any]:
        record = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return record

    def _status(self, records: Sequence[dict[str, Any]]) -> str:
        losses = [
            f"stage {stage} {name} {record[name]:.4g}"
            for stage, (name, record) in enumerate(zip(self._loss_names, records, strict=True))
        ]
        return ", ".join([*losses, self._speed()])

    def _short_status(self, records: Sequence[dict[str, Any]]) -> str:
        """The task loss, the reconstruction losses of the stages before it, and the speed."""
        *earlier, loss = (record[name] for name, record in zip(self._loss_names, records, strict=True))
        local = [f"reconstruction {'/'.join(f'{value:.3g}' for value in earlier)}"] if earlier else []
        return ", ".join([f"loss {loss:.4g}", *local, self._speed()])

    def _speed(self) -> str:
        seen = sum(records[-1]["num_tokens"] for records in self.records)
        return f"{seen / (time.perf_counter() - self._begun):.0f} tokens/s"

    def join(self) -> None:
        """Waits for the last record of the last stage."""
        self._thread.join()

    def summary(self) -> list[dict[str, float]]:
        """By stage: the share of the run's wall time (from the first step) spent computing, receiving and sending."""
        shares = []
        for stage in range(len(self._loss_names)):
            records = [records[stage] for records in self.records]
            wall = sum(record["step_seconds"] for record in records)
            compute = sum(record[f"{phase}_seconds"] for record in records for phase in COMPUTE_PHASES)
            waits = {w: sum(record[f"wait_{w}_seconds"] for record in records) / wall for w in ("receive", "send")}
            shares.append(
                {"computing": compute / wall, "waiting to receive": waits["receive"], "waiting to send": waits["send"]}
            )
        return shares

    @property
    def seconds(self) -> float:
        """Since the collector began."""
        return time.perf_counter() - self._begun
