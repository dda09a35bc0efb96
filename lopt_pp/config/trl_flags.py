"""What becomes of each flag of `trl sft` here, those of transformers' `TrainingArguments` among them.

One table, without an import of either. Command lines and YAML files go by it (`foreign.py`), docs/trl.md shows it, and
a test holds it against the fields of the installed versions.
"""

from lopt_pp.config.foreign_rules import Row
from lopt_pp.config.trl_data import DATA
from lopt_pp.config.trl_run import RUN
from lopt_pp.config.trl_training import TRAINING

TABLE: dict[str, list[Row]] = {**DATA, **TRAINING, **RUN}
"""By the sections of docs/trl.md."""
