"""`t5x adopt`: converts runs of upstream T5X to runs of this package, and back. T5X need not be installed.

    t5x adopt runs/t5x --output=runs/adopted                 the newest checkpoint of a gin/t5x/*.gin run
    t5x adopt runs/first --output=runs/given --to=t5x        the other way: a MODEL_DIR that T5X continues

An adopted run has the checkpoint and a ledger computed from the order, since T5X records none. Its settings are read
from T5X's own config.gin, if it was made from a file in gin/t5x/.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath

from codellm_jax.configuration import CONFIGURABLES, build, operative, read_configuration, read_settings, settings_in
from codellm_jax.mixture.ledger import Ledger
from codellm_jax.runtime.checkpoints import newest_record, record_of, resolved
from codellm_jax.runtime.compatibility import require_same_model
from codellm_jax.runtime.partitioning import MeshShape
from codellm_jax.runtime.parts import write_record
from codellm_jax.runtime.progress import say
from codellm_jax.settings import Configuration, Setting
from codellm_jax.training.begin import Run, place
from codellm_jax.training.kept import Provenance
from codellm_jax.training.plan import Plan, Training, make_plan
from codellm_jax.upstream.trees import copy_state, find_checkpoint, give_state
from codellm_jax.weights import start
from codellm_jax.weights.exporting import written_whole

# Configurables by the last part of their name in T5X's gin: DecoderConfig -> model.
OURS = {target.rpartition(":")[2]: name for name, target in CONFIGURABLES.items()}
TUNING = "gin/tune.gin"
STEPS_AT_ONCE = 1024  # of the ledger
# Settings that belong to a run itself, wherever it was trained.
OF_THE_FOLDER = ("train.model_dir", "train.initial_checkpoint_path")


def adopt(
    source: str, output: str, gin_files: Sequence[str] = (), overrides: Sequence[tuple[str, str]] = (),
    search_paths: Sequence[str] = (),
) -> str:
    """Makes a run directory from the newest checkpoint of a T5X model directory; returns a summary.

    Args:
      source: T5X's MODEL_DIR, or a checkpoint_STEP in it.
      output: the run directory, which must not exist.
      gin_files, overrides, search_paths: as for `t5x train`. Without a file, the settings come from T5X's config.gin.

    Raises:
      FileNotFoundError, ValueError: with a one-line message.
    """
    _require_free(output)
    checkpoint, step = find_checkpoint(source)
    overrides = [*overrides, ("MODEL_DIR", output)]
    if gin_files:
        configuration = read_configuration(gin_files, overrides, search_paths)
    else:
        base, found = settings_of(checkpoint.parent)
        if base == TUNING and "INITIAL_CHECKPOINT_PATH" not in dict(overrides):
            raise ValueError(f"{source} was tuned: give --gin.INITIAL_CHECKPOINT_PATH=RUN, the adopted run from which "
                             "it was tuned.")
        configuration = read_configuration([base], [*found, *overrides], search_paths)
    training: Training = build(configuration, "train")
    plan = make_plan(dataclasses.replace(training, mesh=MeshShape()), say)
    if step > plan.last_step:
        raise ValueError(f"{checkpoint} was trained for {step} steps, but the settings say {plan.last_step}: give "
                         f"--gin.TRAIN_STEPS={step} or its planned steps.")
    _, dropout_rng = jax.random.split(jax.random.key(training.seed))
    ledger = _ledger(training, plan, step)
    text, values = operative(configuration)
    with written_whole(epath.Path(resolved(output))) as made:
        folder = made / "checkpoints" / str(step)
        sums = copy_state(checkpoint, step, plan.state, np.asarray(jax.random.key_data(dropout_rng)), folder)
        record = write_record(folder, {"settings": values, "ledger": ledger.to_json(), "held_out": None,
                                       "interval": None, "place": place(training, plan, step)}, sums)
        (made / "config.gin").write_text(text)
        run = Run(dataclasses.replace(training, model_dir=str(made)), plan, plan.state, ledger, 0)
        provenance = Provenance(run, values, configuration.asked, "t5x", active=True)
        run.step = step
        provenance.write(run, record["digest"], {}, ended=False)
    return f"{checkpoint} is adopted as {output}, step {step} of {plan.last_step}.\n{ledger.table(plan.mixture.order)}"


def _ledger(training: Training, plan: Plan, step: int) -> Ledger:
    """The ledger of the order's draws up to a step."""
    parent, order = None, plan.mixture.order
    if path := training.initial_checkpoint_path:
        at, record = start.newest_record(path)
        require_same_model(record, training.vocabulary, plan.model.config, path)
        parent = record["ledger"] | {"model_dir": resolved(path), "step": at, "digest": record["digest"]}
    ledger = Ledger.begin(
        plan.mixture.stage, order, training.vocabulary.content_hash, training.mixture.length, parent,
        conversations=any(rows.conversations for rows in plan.mixture.training))
    for first in range(0, step, STEPS_AT_ONCE):
        last = min(first + STEPS_AT_ONCE, step)
        drawn = order.draw(np.arange(first * training.batch_size, last * training.batch_size))
        ledger.add(order, drawn.source, plan.mixture.sizes(drawn).counted)
    return ledger


def settings_of(model_dir: epath.Path) -> tuple[str, list[tuple[str, str]]]:
    """The gin file of this package that matches a config.gin of T5X, and the differences from it as overrides."""
    path = model_dir / "config.gin"
    theirs = Configuration(tuple(map(_ours, settings_in(str(path)) if path.exists() else ())))
    if "train.batch_size" not in theirs.effective:
        raise ValueError(f"{path} was not made from a file in gin/t5x/, so it does not contain the run's settings: "
                         "name the equivalent gin files, such as --gin_file=gin/mixed_pretrain.gin.")
    stage = _resolved(theirs, "mixture.stage")
    base = TUNING if stage == "'tuning'" else "gin/pretrain.gin"
    own = read_settings([base], [])
    found = {}
    for name in theirs.effective:
        value = _resolved(theirs, name)
        if "." not in name or name in OF_THE_FOLDER or name.partition(".")[0] not in CONFIGURABLES:
            continue
        if value != _resolved(own, name):
            at = own.effective[name].value if name in own.effective else ""
            found[at[1:] if re.fullmatch(r"%\w+", at) else name] = str(value)
    return base, list(found.items())


def _resolved(configuration: Configuration, name: str) -> str | None:
    """As `Configuration.resolved`, but leaves a macro without a value unchanged."""
    effective = configuration.effective
    value = effective[name].value if name in effective else None
    while value and value[0] == "%" and value[1:] in effective:
        value = effective[value[1:]].value
    return value


def _ours(setting: Setting) -> Setting:
    """A binding in T5X's gin with its names, and its references, replaced by those of this package."""
    scoped, _, parameter = setting.name.rpartition(".")
    name = f"{OURS[last]}.{parameter}" if scoped and (last := scoped.rpartition(".")[2]) in OURS else setting.name
    value = re.sub(r"@(?:[\w/.]*[/.])?(\w+)", lambda found: f"@{OURS[found[1]]}" if found[1] in OURS else found[0],
                   setting.value)
    return Setting(name, value, setting.where)


def give(source: str, output: str) -> str:
    """Writes the newest checkpoint of a run, or that of RUN@STEP, as a T5X checkpoint in the new MODEL_DIR `output`;
    returns a line about it.

    Raises:
      FileNotFoundError, ValueError: with a one-line message.
    """
    _require_free(output)
    named = re.fullmatch(r"(.+)@(\d+)", source)
    run = named[1] if named else source
    step, record = (int(named[2]), record_of(run, int(named[2]))) if named else newest_record(run)
    if "step" not in record["checksums"]:
        raise ValueError(f"{run} holds only parameters, from which T5X cannot continue: train it for a step first.")
    with written_whole(epath.Path(resolved(output))) as made:
        give_state(run, step, record, made)
    return f"{run}, step {step}, is {output}/checkpoint_{step} to T5X."


def _require_free(output: str) -> None:
    place = epath.Path(resolved(output))
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"{place} exists already: choose another --output or remove it.")
