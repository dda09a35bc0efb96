"""Every flag of a run."""

import dataclasses
from typing import Any, get_type_hints

from lopt_pp.config.train_config import Config

FLAGS: dict[str, dataclasses.Field[Any]] = {
    flag.name: flag for component in get_type_hints(Config).values() for flag in dataclasses.fields(component)
}
"""The fields of all groups, by the name of the flag."""
