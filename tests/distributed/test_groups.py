"""The groups that the processes of a run talk in."""

import json
from pathlib import Path

from ranks import ranks

from lopt_pp.distributed.groups import GROUP_TIMEOUT


def test_all_groups_have_the_stated_limit_also_those_of_all_processes(tmp_path: Path) -> None:
    """A mesh of torch's would hand out the default group here, and give the others limits of torch's own."""
    with ranks(tmp_path, [tmp_path], [tmp_path], module="groups_worker") as started:
        assert [rank.status(60) for rank in started] == [0, 0], [rank.text for rank in started]
    limit = GROUP_TIMEOUT.total_seconds()
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "replicas: default": [limit, [0, 1]],
            "replicas: replicas": [limit, [0, 1]],
            "replicas: pipeline": [limit, [rank]],
            "pipeline: default": [limit, [0, 1]],
            "pipeline: replicas": [limit, [rank]],
            "pipeline: pipeline": [limit, [0, 1]],
        }
