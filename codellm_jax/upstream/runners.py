"""Whose steps `t5x train` takes, by the name that --runner gives."""

import importlib

from codellm_jax.training.train import OWN, Runner

# What T5X cc342d4 imports beside what this package needs anyway. Its own list would replace packages of this one.
INSTALL = ("pip install fiddle cached_property chex grain, and pip install --no-deps T5X, AirIO and jestimator from "
           "their sources: see docs/t5x.md")


def runner(name: str) -> Runner:
    """The runner of a name. Raises ValueError where T5X, or what it imports, is not installed."""
    if name == "own":
        return OWN
    require_t5x("--runner=t5x needs upstream T5X")
    from codellm_jax.upstream.trainer import trainer_step

    return Runner("t5x", trainer_step)


def require_t5x(what: str) -> None:
    """Raises ValueError, beginning with `what`, where T5X cannot be imported."""
    try:
        importlib.import_module("t5x.trainer")
    except ImportError as error:
        raise ValueError(f"{what}, and importing it says: {error}. Install it: {INSTALL}.") from None
