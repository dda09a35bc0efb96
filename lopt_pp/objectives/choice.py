"""Finds the local objective that the flags name, and makes it."""

import inspect
from collections.abc import Callable

import torch

from lopt_pp.config.objective import ObjectiveConfig
from lopt_pp.errors import LoptError
from lopt_pp.model.block import BlockModel
from lopt_pp.model.partition import BlockSpec
from lopt_pp.objectives.auxiliary import AuxiliaryNextToken
from lopt_pp.objectives.base import Objective, Site
from lopt_pp.objectives.reconstruction import Reconstruction
from lopt_pp.objectives.task import task_objective
from lopt_pp.util.seeds import derive_seed
from lopt_pp.util.user_code import describe, load_user_object

_OWN: dict[str, type[Objective]] = {"reconstruction": Reconstruction, "next_token": AuxiliaryNextToken}


def local_objective_class(config: ObjectiveConfig) -> type[Objective] | None:
    """What the blocks before the last learn from; None where they only run forward.

    Raises:
        LoptError: `--local_objective` names nothing, or something that is not an objective.
    """
    if config.local == "none":
        return None
    return _OWN.get(config.local) or _load(config.local)


def nothing_to_load(spec: BlockSpec) -> BlockModel:
    """For where there is no pretrained model to make an objective from."""
    raise LoptError(f"there is no pretrained model here to load {spec} from")


def local_objective(
    block: BlockModel, config: ObjectiveConfig, seed: int, load: Callable[[BlockSpec], BlockModel] = nothing_to_load
) -> Objective | None:
    """What the block learns from: the task if it is the last; None where it only runs forward.

    Args:
        block: with its pretrained weights.
        config: the flags.
        seed: of the run.
        load: makes a model of further layers; see `lopt_pp.objectives.Site`.
    """
    if block.spec.is_last:
        return task_objective(config, measures=True)
    kind = local_objective_class(config)
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(derive_seed(seed, block.spec.stage))
    return make_objective(kind, Site(block, config, generator, load))


def make_objective(kind: type[Objective], site: Site) -> Objective:
    """Makes an objective for one block.

    Raises:
        LoptError: its constructor fails.
    """
    try:
        return kind(site)
    except LoptError:
        raise
    except Exception as error:  # Whatever the user's own class may raise.
        raise LoptError(
            f"--local_objective {site.config.local}: {kind.__name__}(site) fails for stage {site.block.spec.stage} "
            f"with {describe(error)}"
        ) from error


def _load(name: str) -> type[Objective]:
    """The user's own class, of which everything is checked that can be without a block."""
    flag = f"--local_objective {name}"
    what = f"{', '.join(_OWN)}, none, or an objective of your own as package.module:Class"
    kind = load_user_object("--local_objective", name, what)
    class_name = name.partition(":")[2]
    if not (isinstance(kind, type) and issubclass(kind, Objective)):
        raise LoptError(f"{flag}: {class_name} is not a subclass of lopt_pp.objectives.Objective")
    if kind.__abstractmethods__:
        raise LoptError(f"{flag}: {class_name} does not define {', '.join(sorted(kind.__abstractmethods__))}")
    if not str(getattr(kind, "name", "")).endswith("_loss"):
        raise LoptError(f"{flag}: {class_name} needs a name that ends in _loss, for logs and metrics")
    try:
        inspect.signature(kind).bind(None)
    except TypeError as error:
        raise LoptError(
            f"{flag}: {class_name} is made by {class_name}(site), see lopt_pp.objectives.Site; its constructor takes "
            f"other arguments ({error})"
        ) from error
    return kind
