"""How many processes a run has, by its flags and the GPUs of the machine."""

import pytest

from lopt_pp import load_config
from lopt_pp.distributed.process_count import count_processes


@pytest.mark.parametrize(
    ("flags", "nproc", "gpus", "said"),
    [
        ("", None, 0, "1 process (2 stages on the CPU; --nproc 2 makes one for each)"),
        ("--num_stages 1", None, 0, "1 process (1 stage on the CPU)"),
        ("", 2, 0, "2 processes (--nproc 2)"),
        ("--pipeline_processes 2", None, 0, "2 processes (--pipeline_processes 2)"),
        ("--data_parallel 2", None, 0, "2 processes (2 stages x --data_parallel 2 on the CPU)"),
        ("", None, 1, "1 process (2 stages on 1 of 1 GPU)"),
        ("", None, 2, "2 processes (2 stages on 2 of 2 GPUs)"),
        ("", None, 8, "2 processes (2 stages on 2 of 8 GPUs; --nproc 8 makes 4 replicas)"),
        ("--num_stages 4", None, 2, "2 processes (4 stages on 2 of 2 GPUs)"),
        ("--data_parallel 4", None, 8, "8 processes (2 stages x --data_parallel 4 on 8 of 8 GPUs)"),
        ("--num_stages 4 --data_parallel 2", None, 4, "4 processes (4 stages x --data_parallel 2 on 4 of 4 GPUs)"),
        ("--data_parallel 4", None, 2, "4 processes (2 stages x --data_parallel 4 on 2 of 2 GPUs)"),
        (
            "--pipeline_processes 1 --data_parallel 2",
            None,
            8,
            "2 processes (--pipeline_processes 1 x --data_parallel 2)",
        ),
        ("--backend gloo", None, 8, "1 process (2 stages on the CPU; --nproc 2 makes one for each)"),
        ("", 1, 8, "1 process (--nproc 1)"),
    ],
)
def test_how_many_processes(flags: str, nproc: int | None, gpus: int, said: str) -> None:
    config = load_config(f"--model_name_or_path m --train_file r --output_dir o {flags}".split())
    count = count_processes(config, nproc, lambda: gpus)
    assert str(count) == said
    assert config.topology(count.number).world_size == count.number
