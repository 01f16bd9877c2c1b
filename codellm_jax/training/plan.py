"""The plan of a run before anything is trained: the objects of its gin files, and a page about them."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from codellm_jax.evaluation.evaluate import Evaluation
from codellm_jax.mixture.batches import rows_of_packed_steps
from codellm_jax.mixture.mixture import Mixture, OpenMixture, open_mixture
from codellm_jax.mixture.order import Order
from codellm_jax.model.decoder import Decoder, DecoderConfig, flops_per_token, parameter_count
from codellm_jax.runtime.compiler import is_deterministic
from codellm_jax.runtime.optimization import Schedule
from codellm_jax.runtime.partitioning import MeshShape, make_mesh, require_divisible
from codellm_jax.runtime.process import require_plain_name
from codellm_jax.runtime.state import TrainState, abstract_state, bytes_per_device, memory_per_device
from codellm_jax.tracking.trackers import require_known
from codellm_jax.training.begin import Trunk, trunk_of
from codellm_jax.vocabulary import Vocabulary

GIB = 2**30
BAR = 40  # characters of a share of 1
MANY_EPOCHS = 4  # more repeats of the same tokens give a warning (Muennighoff et al., 2023)


@dataclasses.dataclass(frozen=True)
class Training:
    """The settings of a training run.

    Attributes:
      model_dir: the run directory.
      mixture: the data.
      vocabulary: the vocabulary of the rows; its padded size is the model's.
      model: makes the decoder's configuration when called with `vocabulary_size` and `length`.
      optimizer: makes the gradient transformation when called with the learning-rate schedule.
      learning_rate: the schedule: a function from the step to the learning rate.
      mesh: devices along each axis.
      batch_size: rows per step, over all devices; in tuning examples per step, packed or not.
      train_steps: steps of the whole run.
      eval_period: steps between evaluations of held-out rows; the last step is also evaluated.
      checkpoint_period: steps between checkpoints; the last step also has one.
      log_period: steps between lines of the log.
      eval_rows: held-out rows of each source that are evaluated.
      keep_last: number of the newest checkpoints to keep.
      keep_every: checkpoints at multiples of this step are also kept; None for none.
      keep_steps: checkpoints after these steps are also written and kept; whole numbers are steps, fractions are of
        train_steps.
      microbatches: parts of a batch that are processed in turn before one update, to save memory.
      initial_checkpoint_path: a run directory or published weights (a folder, hf://ORG/NAME) whose parameters the run
        starts from.
      branch_from: RUN@STEP, a checkpoint that the run continues with its optimizer, random state and place in the data.
      evaluation: benchmarks of each evaluation during training; None for none.
      export_period: steps between exports; the last step is also exported. An export writes the parameters in float32
        to MODEL_DIR/exports/STEP as a folder for Hugging Face's libraries; None for never.
      trackers: destinations of records besides MODEL_DIR/metrics.jsonl, some of "tensorboard", "wandb" and "mlflow".
      seed: seed of the parameters, the order of the data and dropout.
    """

    model_dir: str
    mixture: Mixture
    vocabulary: Vocabulary
    model: Callable[..., DecoderConfig]
    optimizer: Callable[[Schedule], optax.GradientTransformation]
    learning_rate: Schedule
    mesh: MeshShape
    batch_size: int
    train_steps: int
    eval_period: int
    checkpoint_period: int
    log_period: int = 10
    eval_rows: int = 64
    keep_last: int = 2
    keep_every: int | None = None
    keep_steps: Sequence[int | float] = ()
    microbatches: int = 1
    initial_checkpoint_path: str | None = None
    branch_from: str | None = None
    evaluation: Evaluation | None = None
    export_period: int | None = None
    trackers: Sequence[str] = ("tensorboard",)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "train_steps", "eval_period", "checkpoint_period", "log_period", "eval_rows",
                     "keep_last", "microbatches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name.upper()} must be a whole number of at least 1, found {value!r}.")
        if self.export_period is not None and self.export_period < 1:
            raise ValueError(f"EXPORT_PERIOD must be at least 1, or None for never, found {self.export_period}.")
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"train.keep_every must be at least 1, or None for none, found {self.keep_every}.")
        for step in self.keep_steps:
            if isinstance(step, bool) or not 0 < step <= (self.train_steps if isinstance(step, int) else 1):
                raise ValueError(f"KEEP_STEPS must list steps from 1 to TRAIN_STEPS = {self.train_steps}, or fractions "
                                 f"of them up to 1.0, found {step!r}.")
        if self.branch_from is not None and self.initial_checkpoint_path is not None:
            raise ValueError("BRANCH_FROM and INITIAL_CHECKPOINT_PATH are both set: a run starts from one of them.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"SEED must be a whole number from 0 to {2**32 - 1}, found {self.seed!r}.")
        require_known(self.trackers)
        if not self.model_dir.strip():
            raise ValueError("MODEL_DIR is empty: name the run's directory, such as runs/first.")
        require_plain_name("MODEL_DIR", self.model_dir)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The objects of a run; `state` is abstract: shapes, dtypes and shardings."""

    mesh: Mesh
    model: Decoder
    optimizer: optax.GradientTransformation
    state: TrainState
    mixture: OpenMixture
    last_step: int  # train_steps, or fewer where MAX_EPOCHS ends the run first
    rows: int  # of a step's arrays: batch_size, or fewer if examples are packed
    filled: float  # the mean fraction of them that packed examples fill
    questions: tuple[Any, ...]  # of the benchmarks asked during training, from `Evaluation.load`
    trunk: Trunk | None = None  # of a branch

    @property
    def first_step(self) -> int:
        """The steps already done when the run begins: those of its trunk."""
        return self.trunk.step if self.trunk else 0


def make_plan(
    training: Training, report: Callable[[str], None] = print, trunk: Trunk | None = None,
    state: TrainState | None = None,
) -> Plan:
    """Builds everything except arrays; writes the cache of rows if it is missing.

    `trunk` replaces that of BRANCH_FROM if the latter is not trained yet; `state` is the abstract state, if it is known
    from a run with the same model, optimizer and mesh.

    Raises:
      ValueError: in one line, for any setting that does not fit the others.
    """
    questions = tuple(training.evaluation.load()) if training.evaluation else ()
    mesh = make_mesh(training.mesh)
    packing = training.mixture.stage == "tuning" and training.mixture.packing
    if not packing:
        require_divisible(training.batch_size, training.microbatches, mesh)
    model = Decoder(training.model(vocabulary_size=training.vocabulary.size, length=training.mixture.length))
    optimizer = training.optimizer(training.learning_rate)
    state = state or abstract_state(model, optimizer, mesh, training.mesh)
    trunk = trunk or trunk_of(training)
    first_step = trunk.step if trunk else 0
    if first_step >= training.train_steps:
        raise ValueError(f"BRANCH_FROM begins after step {first_step}, and TRAIN_STEPS = {training.train_steps} "
                         "includes the steps of the trunk: set it higher.")
    total = training.train_steps * training.batch_size
    mixture = open_mixture(
        training.mixture, training.vocabulary, training.seed, total, training.batch_size, report,
        trunk.branch if trunk else None)
    last_step = training.train_steps
    if training.mixture.max_epochs is not None:
        exhausted = mixture.order.exhausted_at(training.mixture.max_epochs, total)
        if exhausted is not None:
            last_step = exhausted[0] // training.batch_size
            if last_step <= first_step:
                raise ValueError(
                    f"MAX_EPOCHS = {training.mixture.max_epochs} ends the run before its first step: "
                    f"{exhausted[1].name} has {exhausted[1].rows} {unit(mixture)}. Raise it, add data, or lower "
                    "BATCH_SIZE.")
    rows, filled = training.batch_size, 1.0
    if packing:
        most, positions = rows_of_packed_steps(
            mixture.order, mixture.training, training.batch_size, last_step, first_step)
        shards = mesh.shape["data"] * mesh.shape["fsdp"] * training.microbatches
        rows = -(-most // shards) * shards
        filled = positions / ((last_step - first_step) * rows * training.mixture.length)
    return Plan(mesh, model, optimizer, state, mixture, last_step, rows, filled, questions, trunk)


def kept_steps(training: Training) -> list[int]:
    """KEEP_STEPS in steps: a fraction of the run is rounded to the nearest step, at least the first."""
    return sorted({step if isinstance(step, int) else max(1, round(step * training.train_steps))
                   for step in training.keep_steps})


def unit(mixture: OpenMixture) -> str:
    """The plural noun for positions of the order."""
    return "examples" if mixture.stage == "tuning" else "rows"


def describe(training: Training, plan: Plan) -> str:
    """The plan as a page of text: mixture, schedule, epochs to come, parameters, mesh, memory."""
    mixture, order, config = plan.mixture, plan.mixture.order, plan.model.config
    tuning = mixture.stage == "tuning"
    last = plan.last_step * training.batch_size
    drawn_rows = last - order.begin
    counted = "examples" if tuning else "tokens"
    lines = [f"{'source':<26} {counted:>15} {'share':>7} {'of':>15} {'epochs to come':>15}"]
    for source, drawn, before, cached in zip(
            order.sources, order.counts(last), order.drawn_before.tolist(), mixture.training, strict=True):
        size = 1 if tuning else cached.length
        lines.append(f"{source.name:<26} {drawn * size:>15,} {drawn / drawn_rows:>7.4f} "
                     f"{cached.count * size:>15,} {drawn / cached.count:>15.2f}"
                     + (f" after {before / cached.count:.2f} of the trunk" if before else ""))
    lines += ["", *schedule_lines(order, training.batch_size, plan.last_step),
              *learning_rate_lines(training.learning_rate, plan.first_step, plan.last_step),
              *branch_lines(training, plan)]
    if training.mixture.mix_phases is not None and training.mixture.code_rate is not None:
        lines.append(f"MIX_PHASES is set, so that CODE_RATE = {training.mixture.code_rate} is not used.")
    for cached in mixture.training:
        lines += cached.notes
        if cached.conversations:
            form = "in the vocabulary's chat template" if training.vocabulary.chat_template else \
                "as instructions and responses, because the vocabulary has no chat template"
            lines.append(f"{cached.name}: {cached.conversations:,} of {cached.documents:,} examples are conversations, "
                         f"{form}.")
        if cached.loss:
            examples = cached.documents - cached.left_out
            counted = f"all of their {cached.tokens:,} tokens" if cached.loss == "all" else \
                f"their answers, {cached.tokens - cached.uncounted:,} of {cached.tokens:,} tokens"
            lines.append(
                f"{cached.name}: {examples:,} instructions are mixed with the documents; the loss counts {counted}."
                + f" {cached.left_out:,} without an answer are left out." * bool(cached.left_out))
        elif cached.cut or cached.left_out:
            lines.append(f"{cached.name}: {cached.cut:,} of {cached.documents:,} examples are cut to "
                         f"{cached.length + 1} tokens; {cached.left_out:,} are left out, since no token of their "
                         "target would remain.")
    lines += [f"WARNING: {warning}" for warning in mixture.warnings]
    for source, drawn, before in zip(order.sources, order.counts(last), order.drawn_before.tolist(), strict=True):
        if not drawn and order.asked(last)[order.sources.index(source)]:
            lines.append(f"WARNING: the share of {source.name} is too small for it to be drawn in this run.")
        if drawn and before + drawn > MANY_EPOCHS * source.rows:
            lines.append(f"WARNING: {source.name} will be repeated {(before + drawn) / source.rows:.1f} times; "
                         "MAX_EPOCHS would stop the run instead.")
    if plan.last_step < training.train_steps:
        missed = [start for start in order.schedule.phase_starts
                  if last <= start < training.train_steps * training.batch_size]
        lines.append(f"MAX_EPOCHS = {training.mixture.max_epochs} ends the run at step {plan.last_step} of "
                     f"{training.train_steps}." + (
                         f" The mix from step {missed[0] // training.batch_size} on is not reached." if missed else ""))
    if not is_deterministic(plan.mesh, config):
        lines.append(f"WARNING: with model.scan_unroll = {config.scan_unroll} a GPU adds in any order: another run of "
                     "this configuration will have slightly different losses.")
    full, causal = (flops_per_token(config, causal=causal) for causal in (False, True))
    own_steps = plan.last_step - plan.first_step
    tokens = own_steps * plan.rows * training.mixture.length
    step = f"{plan.rows} rows of {training.mixture.length}"
    if tuning:
        step = f"{training.batch_size} examples in {step}" + (
            f", {plan.filled:.0%} filled" if training.mixture.packing else ", not packed")
    keys = f" on {config.key_heads} of keys" if config.key_heads < config.heads else ""
    lines += [
        "",
        f"model        {parameter_count(config):,} parameters: {config.layers} layers of {config.hidden}, "
        f"{config.heads} heads{keys}, {'query layer' if config.query_layer else 'no query layer'}, "
        f"vocabulary {config.vocabulary_size:,}, {config.dtype}",
        f"training     {own_steps:,} steps of {step}: {tokens:,} tokens"
        f"{' with padding' if tuning else ''}, {full * tokens:.3g} FLOPs ({causal * tokens:.3g} with causal attention "
        "counted by half)",
        f"mesh         {' x '.join(f'{axis} {size}' for axis, size in plan.mesh.shape.items())} on "
        f"{plan.mesh.size} {jax.devices()[0].device_kind} in {jax.process_count()} process(es)",
        "memory       " + memory_estimate(training, plan),
        f"vocabulary   {training.vocabulary.path} ({training.vocabulary.content_hash[:12]})",
        f"order        {order.fingerprint()[:12]}",
        *(f"prepared     {name}: {one['folder']}, by the steps {one['steps_sha256'][:12]} of the inputs "
          f"{one['inputs_sha256'][:12]}" for name, found in mixture.prepared.items() for one in found),
        *(["benchmarks   " + ", ".join(
            f"{loaded.name}{' (sample)' * loaded.is_sample} {len(loaded.questions):,}" for loaded in plan.questions)
           + f" questions, every {training.eval_period:,} steps"] if plan.questions else []),
        *([f"starts from  {start}"] if (start := training.branch_from or training.initial_checkpoint_path) else []),
        f"run          {training.model_dir}",
    ]
    return "\n".join(lines)


def schedule_lines(order: Order, batch_size: int, last_step: int) -> list[str]:
    """The share of code over the run as lines of text, with a bar where it changes."""
    schedule, run = order.schedule, last_step * batch_size
    # One line for each phase, eight for a ramp.
    first_step = order.begin // batch_size
    edges = {first_step, last_step}
    for start, following in itertools.pairwise([*order.phase_starts, run]):
        parts = 1 if schedule.share_at(start) == schedule.share_at(start + 1) else 8
        edges |= {round((start + (following - start) * part / parts) / batch_size) for part in range(parts)}
    steps = sorted(step for step in edges if step <= last_step)
    if len(steps) < 3 and not any(schedule.tables):
        share = float(schedule.asked(run) - schedule.asked(order.begin)) / (run - order.begin)
        return [f"share of code: {share:.4f} from step {first_step}"]
    code = [source.pool == "code" for source in order.sources]
    lines = [f"{'share of code':<20} {'asked':>7} {'drawn':>7}"]
    for begin, end in itertools.pairwise(steps):
        rows = (end - begin) * batch_size
        asked = [float(after - before) / rows for before, after in zip(
            order.asked(begin * batch_size), order.asked(end * batch_size), strict=True)]
        drawn = (order.counts(end * batch_size) - order.counts(begin * batch_size)) / rows
        share = sum(part for part, is_code in zip(asked, code, strict=True) if is_code)
        bar = "#" * round(share * BAR)
        parts_of_sources = "  ".join(f"{source.name} {part:.3f}" for source, part in zip(
            order.sources, asked, strict=True)) if any(schedule.tables) else ""
        lines.append(f"  step {begin:>6,}-{end:<6,} {share:>7.4f} {drawn[code].sum():>7.4f} |{bar:<{BAR}}| "
                     f"{parts_of_sources}".rstrip())
    return lines


def branch_lines(training: Training, plan: Plan) -> list[str]:
    """For a branch, a line on whether its learning rate continues its trunk's."""
    if plan.trunk is None:
        return []
    (last, following), now = plan.trunk.learning_rates, float(training.learning_rate(plan.trunk.step))
    if abs(now - following) <= 0.01 * max(now, following):
        return [f"The learning rate continues the trunk's last, {last:.3g}: {now:.3g}."]
    return [f"WARNING: the learning rate does not continue the trunk's last, {last:.3g}: the branch begins at "
            f"{now:.3g}, where the trunk continued with {following:.3g}."]


def learning_rate_lines(schedule: Schedule, first_step: int, last_step: int) -> list[str]:
    """The learning rate over the run as lines of text, with a bar: at its first step, its last, and some between."""
    steps = sorted({first_step + round((last_step - 1 - first_step) * part / 8) for part in range(9)})
    rates = [float(schedule(step)) for step in steps]
    highest = max(rates) or 1.0
    return ["learning rate", *(f"  step {step + 1:>14,} {rate:>9.3g} |{'#' * round(BAR * rate / highest):<{BAR}}|"
                               for step, rate in zip(steps, rates, strict=True))]


class Layout(NamedTuple):
    """The part of a `Plan` that determines a run's memory on devices."""

    mesh: Mesh
    model: Decoder
    state: TrainState
    rows: int


def memory_parts(training: Training, plan: Plan | Layout) -> dict[str, int]:
    """Bytes per device: the exact state, gradients as large as the parameters, activations estimated from remat."""
    config = plan.model.config
    shards = plan.mesh.shape["data"] * plan.mesh.shape["fsdp"]
    tokens = plan.rows // shards // training.microbatches * training.mixture.length
    itemsize = jax.numpy.dtype(config.dtype).itemsize
    # Values that a block keeps per token: its input; outputs of its matmuls, split along `model` like heads and the
    # MLP; and without remat also those of norms and activations, and attention's probabilities over half the keys.
    model = plan.mesh.shape["model"]
    attended = 2 * config.query_width + 2 * config.key_width  # queries, keys, values, and attention's output
    matmuls = 2 * config.hidden + (attended + config.feedforward * (2 if config.is_gated else 1)) / model
    kept = itemsize * {
        "full": config.hidden,
        "offload": 0,
        "attention": config.hidden + attended / model,
        "dots": config.hidden + matmuls,
        "none": 4 * config.hidden + 2 * matmuls + config.heads / model * training.mixture.length,
    }[config.remat]
    return {
        "state": bytes_per_device(plan.state),
        "gradients": bytes_per_device(plan.state.params),
        "activations about": math.ceil(tokens * kept * config.layers),
    }


def memory_estimate(training: Training, plan: Plan) -> str:
    """`memory_parts` as a line of text, and a second one that warns if a device has less."""
    parts, has = memory_parts(training, plan), memory_per_device()
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    line = f"about {sum(parts.values()) / GIB:.2f} GiB per device: {listed}"
    if sum(parts.values()) > has:
        line += (f"\nWARNING: a device here has {has / GIB:.2f} GiB. A smaller BATCH_SIZE or model, "
                 "train.microbatches, model.remat='full', or more devices along mesh.fsdp reduce it.")
    return line

