"""Starts a run: from its own newest checkpoint, as a branch of another run, from the parameters of another run or
published weights, or from new ones.

    BRANCH_FROM=RUN@STEP             parameters, optimizer, random state, and place in the data of RUN after STEP
    INITIAL_CHECKPOINT_PATH=START    only parameters

A branch continues its trunk's step count, and everything that depends on the step: the learning rate, the mix. Its
first session reads the trunk; after its first checkpoint it no longer needs it.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from codellm_jax.mixture.ledger import Ledger
from codellm_jax.mixture.order import Branch
from codellm_jax.runtime.checkpoints import Checkpoints, newest_record, record_of, resolved, restore_state
from codellm_jax.runtime.compatibility import (
    require_same_model,
    require_same_settings,
    require_same_stage,
    require_same_vocabulary,
)
from codellm_jax.runtime.progress import say
from codellm_jax.runtime.state import TrainState, initial_state, require_memory
from codellm_jax.weights import start

if TYPE_CHECKING:
    from codellm_jax.training.plan import Plan, Training

STATE = "Parameters and optimizer state"


class Point(NamedTuple):
    """A step of a run to branch from, as BRANCH_FROM names it."""

    run: str
    step: int

    @classmethod
    def of(cls, text: str) -> "Point":
        """Reads RUN@STEP. Raises ValueError if it is malformed."""
        found = re.fullmatch(r"(.+)@(\d+)", text)
        if not found:
            raise ValueError(f"BRANCH_FROM must be RUN@STEP, such as runs/trunk@6000, found {text!r}.")
        return cls(found[1], int(found[2]))


class Trunk(NamedTuple):
    """The state inherited from the run that a run branches from, as recorded in its ledger."""

    step: int
    branch: Branch  # its position is counted in this run's batches
    learning_rates: tuple[float, float]  # of the trunk's last step, and of its next one had it continued


def trunk_of(training: "Training") -> Trunk | None:
    """The trunk of a run, read from its own newest checkpoint, or from the trunk's if it has none yet.

    Raises:
      FileNotFoundError, ValueError: in one line; there is no such step, or SEED is not the trunk's.
    """
    if training.branch_from is None:
        return None
    point = Point.of(training.branch_from)
    try:
        saved = newest_record(training.model_dir)[1]["ledger"].get("branch")
    except FileNotFoundError:
        saved = None
    if saved is None:
        record = record_of(point.run, point.step)
        if "place" not in record:
            raise ValueError(f"{training.branch_from} was saved by a version that did not record its place in the "
                             "data: start from its parameters with INITIAL_CHECKPOINT_PATH.")
        saved = {"step": point.step} | record["place"]
    if saved["seed"] != training.seed:
        raise ValueError(f"SEED is {training.seed}, but that of {point.run} is {saved['seed']}: a branch continues "
                         f"the order of its trunk, so give --gin.SEED={saved['seed']}.")
    return trunk_at(saved, training)


def trunk_at(saved: Mapping[str, Any], training: "Training") -> Trunk:
    """The trunk of `training`, given "step", at which it branches from another run, and the `place` saved there."""
    branch = dataclasses.replace(Branch.from_json(saved), position=saved["step"] * training.batch_size)
    last, following = saved["learning_rates"]
    return Trunk(saved["step"], branch, (last, following))


def place(training: "Training", plan: "Plan", step: int) -> dict[str, Any]:
    """The part of a checkpoint for runs that branch from it, as JSON."""
    return plan.mixture.order.branch_at(step * training.batch_size).to_json() | {
        "seed": training.seed, "learning_rates": [float(training.learning_rate(at)) for at in (step - 1, step)]}


@dataclasses.dataclass
class Run:
    """A run under way: `step` steps are done."""

    training: "Training"
    plan: "Plan"
    state: TrainState
    ledger: Ledger
    step: int
    interval: Mapping[str, Any] | None = None  # of the checkpoint: see `meter.Interval`
    resumed: bool = False  # from a checkpoint of its own
    held_out: Mapping[str, Any] | None = None  # the newest losses on held-out rows; see `train.evaluate`


def begin_or_resume(training: "Training", plan: "Plan", checkpoints: Checkpoints, settings: Mapping[str, str]) -> Run:
    """Starts from the newest checkpoint of MODEL_DIR, else a trunk's, else another run's parameters, else new ones."""
    order, vocabulary = plan.mixture.order, training.vocabulary
    trunk = Point.of(training.branch_from) if training.branch_from else None
    path = trunk.run if trunk else training.initial_checkpoint_path

    def check(record: Mapping[str, Any]) -> None:
        require_same_stage(record["ledger"], plan.mixture.stage, training.model_dir, path)
        require_same_vocabulary(record, vocabulary, training.model_dir)
        require_same_settings(record["settings"], settings, training.model_dir)
        require_memory(plan.state, STATE)

    restored = checkpoints.restore_newest(plan.state, check, report=say)
    if restored is not None:
        state, record = restored
        ledger, step = Ledger.from_json(record["ledger"]), int(state.step)
        ledger.check(order, step * training.batch_size)
        say(f"Resuming {training.model_dir} after step {step}.")
        return Run(training, plan, state, ledger, step, record.get("interval"), True, record.get("held_out"))
    begun = functools.partial(
        Ledger.begin, plan.mixture.stage, order, vocabulary.content_hash, training.mixture.length,
        conversations=any(rows.conversations for rows in plan.mixture.training), prepared=plan.mixture.prepared)
    same_model = functools.partial(
        require_same_model, vocabulary=vocabulary, config=plan.model.config, model_dir=str(path))
    if trunk:
        record = record_of(trunk.run, trunk.step)
        same_model(record)
        if record["ledger"]["stage"] != plan.mixture.stage:
            raise ValueError(f"{trunk.run} is a run of {record['ledger']['stage']}, and a branch stays in its stage: "
                             f"for {plan.mixture.stage} start with --gin.INITIAL_CHECKPOINT_PATH={trunk.run}.")
        require_memory(plan.state, STATE)
        state, record = restore_state(trunk.run, trunk.step, plan.state, say)
        branch = {"step": trunk.step} | record["place"]
        return Run(training, plan, state, begun(_parent(record, trunk.run), branch=branch), trunk.step,
                   held_out=record.get("held_out"))
    if path:  # before allocating anything for a model that may be far too large
        same_model(start.newest_record(path)[1])
    require_memory(plan.state, STATE)
    state = initial_state(plan.model, plan.optimizer, plan.state, training.seed)
    if not path:
        return Run(training, plan, state, begun(), 0)
    params, record = start.restore_parameters(path, plan.state.params, check=same_model, report=say)
    return Run(training, plan, state.replace(params=params), begun(_parent(record, path)), 0)


def _parent(record: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The ledger of the run started from, with its directory."""
    return record["ledger"] | {"model_dir": resolved(path), "step": record["step"], "digest": record["digest"]}
