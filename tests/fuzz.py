"""How long hypothesis looks for a counterexample: the same examples each time, a fifth of them unless on
demand.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

ON_DEMAND = os.environ.get("DEJAVU_ON_DEMAND") == "1"


def fuzz(examples: int, **options: Any) -> settings:
    """Settings for so many examples with DEJAVU_ON_DEMAND=1, and for a fifth without; neither time nor chance
    decides.
    """
    number = examples if ON_DEMAND else -(-examples // 5)
    unchecked = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        print_blob=True,
        suppress_health_check=unchecked,
        **options,
    )
