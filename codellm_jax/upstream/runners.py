"""The trainers that `t5x train` can use, by the name in --runner."""

import importlib

from codellm_jax.training.train import OWN, Runner

# The packages that T5X cc342d4 imports and this package does not need. T5X's own list would replace installed packages.
INSTALL = ("pip install fiddle cached_property chex grain, and pip install --no-deps T5X, AirIO and jestimator from "
           "their sources: see docs/t5x.md")


def runner(name: str) -> Runner:
    """The runner with a name. Raises ValueError if T5X, or a package that it imports, is not installed."""
    if name == "own":
        return OWN
    require_t5x("--runner=t5x needs upstream T5X")
    from codellm_jax.upstream.trainer import trainer_step

    return Runner("t5x", trainer_step)


def require_t5x(what: str) -> None:
    """Raises ValueError, beginning with `what`, if T5X cannot be imported."""
    try:
        importlib.import_module("t5x.trainer")
    except ImportError as error:
        raise ValueError(f"{what}, but its import failed: {error}. Install it: {INSTALL}.") from None
