"""The fuzz tests: each reader of a file or a message gives a right result or a clear error, whatever it is given.

    pytest tests/fuzz                              a few hundred examples each, the same every time (as CI does)
    HYPOTHESIS_PROFILE=long pytest tests/fuzz      other examples every time, and fifty times as many

A failing example is shown as small as it could be made; put it into the test with `@example`, so that it stays.
"""

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings

_EVERYWHERE: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}

settings.register_profile(
    "quick",
    max_examples=200,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    **_EVERYWHERE,
)
settings.register_profile("long", max_examples=10_000, database=None, print_blob=True, **_EVERYWHERE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
