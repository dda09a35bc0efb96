"""What a run is refused for before any library is loaded, which takes many seconds.

The processes of the run look again, by the same functions, when they are joined: meanwhile it may have changed.
"""

from pathlib import Path

from lopt_pp.checkpoint.lock import refuse_if_held, this_holder
from lopt_pp.checkpoint.output_dir import LATEST, complete_checkpoints, is_checkpoint, open_output_dir
from lopt_pp.cluster.inputs import check_inputs
from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError
from lopt_pp.metrics.installed import check_installed
from lopt_pp.model.location import has_tokenizer, no_tokenizer
from lopt_pp.model.on_hub import check_named
from lopt_pp.util.files import missing_directories, remove_empty


def check_before_loading(config: Config) -> None:
    """Sees that a run can use its output directory, and that there are its model, its rows and its trackers.

    Leaves nothing behind.

    Args:
        config: of the run.

    Raises:
        LoptError: it would be refused, with the reason.
    """
    check_installed(config.report)
    check_inputs(config)
    name = config.model.model_name_or_path
    if Path(name).is_dir() and not has_tokenizer(name):
        raise LoptError(f"--model_name_or_path {name}: {no_tokenizer(name)}")
    path, which = Path(config.run.output_dir), config.checkpoint.resume_from_checkpoint
    if which not in (None, LATEST) and not is_checkpoint(Path(which)):
        newest = [f"; latest is {found}" for found in complete_checkpoints(path)[:1]]
        raise LoptError(f"--resume_from_checkpoint {which} is not a complete checkpoint{''.join(newest)}")
    refuse_if_held(path, this_holder(launch="", restart=0), watches=False)
    missing = missing_directories(path)
    try:
        open_output_dir(path, config.run.overwrite_output_dir, resumes=which == LATEST, resumes_from=which)
    finally:
        remove_empty(missing)
    check_named(config.model)  # Last, since the hub may be slow to answer.
