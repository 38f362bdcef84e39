"""Hypothesis profiles: `ci` (the default) takes seconds a property, `fuzz` is for long runs.

A property that needs fewer examples scales its profile's number with `examples(fraction)`.
"""

import os

from hypothesis import HealthCheck, settings

SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def _register(name: str, max_examples: int) -> None:
    settings.register_profile(
        name,
        max_examples=max_examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=SLOW_IS_FINE,
    )


_register("ci", 60)
_register("fuzz", int(os.environ.get("FUZZ") or 20_000))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
