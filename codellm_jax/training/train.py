"""Training: the step, its loss, and the loop.

    state, metrics = train_step(state, batch, model=..., optimizer=..., sources=2)

The loop keeps one step in flight: the metrics of step k are read while step k + 1 runs, so that the devices never
wait for the host, yet every loss is checked before a checkpoint could save its effect.
"""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import linen as nn

from codellm_jax.evaluation.evaluate import TaskFailed, ask
from codellm_jax.evaluation.trained import TrainedModel
from codellm_jax.mixture.batches import (
    Array,
    Batch,
    example_batch,
    global_batch,
    held_out_batches,
    held_out_bytes,
    read_ahead,
)
from codellm_jax.mixture.examples import Sizes
from codellm_jax.mixture.ledger import arm
from codellm_jax.mixture.order import POOLS, Draw
from codellm_jax.model.decoder import Decoder, flops_per_token, output_head
from codellm_jax.model.losses import chunk_of, cross_entropy
from codellm_jax.results.files import write_whole
from codellm_jax.results.tables import short_score
from codellm_jax.runtime.checkpoints import Checkpoints, resolved
from codellm_jax.runtime.compatibility import vocabulary_facts
from codellm_jax.runtime.compiler import compiler_options
from codellm_jax.runtime.distributed import agreed, first_process_first, gathered, require_agreement
from codellm_jax.runtime.meter import Meter, Metrics, NotFinite, bits_per_byte_by_source, loss_by_source
from codellm_jax.runtime.partitioning import batch_sharding
from codellm_jax.runtime.process import alone_in, stop_on_signal
from codellm_jax.runtime.profiles import Profile, ProfileSteps
from codellm_jax.runtime.progress import Records, StatusLine, peak_flops, read_records, say
from codellm_jax.runtime.state import TrainState
from codellm_jax.tracking.trackers import Trackers
from codellm_jax.training.begin import Run, begin_or_resume, place
from codellm_jax.training.kept import Provenance, set_earlier_aside
from codellm_jax.training.plan import MANY_EPOCHS, Plan, Training, describe, kept_steps, make_plan
from codellm_jax.weights.exporting import export_while_training


def train_step(
    state: TrainState, batch: Batch, *, model: Decoder, optimizer: optax.GradientTransformation, sources: int,
    microbatches: int = 1,
) -> tuple[TrainState, Metrics]:
    """One update from one global batch.

    The gradient is that of the mean loss over the counted tokens of the whole batch, for any `microbatches`.
    """
    dropout_rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    # One reduction over the devices instead of two that nothing orders: XLA on CPU has been seen to hang in those.
    source_tokens = by_source(batch.weights, batch.sources, sources)
    tokens = jnp.maximum(jnp.sum(source_tokens), 1)  # rows may be prompts alone
    loss_fn = functools.partial(batch_loss, model=model, sources=sources, tokens=tokens)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (loss, source_losses), grads = grad_fn(state.params, batch, dropout_rng)
    else:

        def accumulate(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(state.params, *part)), None

        # Microbatch k takes rows k, k + microbatches, ...: each device splits the rows it already has.
        parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
        zero = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, state.params, batch, dropout_rng))
        ((loss, source_losses), grads), _ = jax.lax.scan(
            accumulate, zero, (parts, jax.random.split(dropout_rng, microbatches)))

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = Metrics(loss, optax.tree.norm(grads), source_losses, source_tokens)
    return TrainState(state.step + 1, params, opt_state, state.rng), metrics


def batch_loss(
    params: Any, batch: Batch, dropout_rng: jax.Array, *, model: Decoder, sources: int, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of a batch's losses over `tokens`, and the sums of each source, float32 [sources], in nats."""
    hidden_BLD: Any = model.apply(
        {"params": params}, batch.inputs, batch.positions, batch.segment_ids,
        deterministic=model.config.dropout_rate == 0.0, rngs={"dropout": dropout_rng})
    embedding_VD = output_head(params)
    loss_sum, losses_BL = cross_entropy(hidden_BLD, embedding_VD, batch.targets, batch.weights,
                                        chunk=chunk_of(len(batch.inputs), len(embedding_VD), gradients=True))
    return loss_sum / tokens, by_source(losses_BL * batch.weights, batch.sources, sources)


def jit_train_step(
    model: Decoder, optimizer: optax.GradientTransformation, state: TrainState, sources: int, microbatches: int
) -> Any:
    """`train_step` as the loop runs it: jitted, the state donated and laid out as `state` (which may be abstract)."""
    mesh: Any = state.step.sharding.mesh  # type: ignore[attr-defined]
    return jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, sources=sources, microbatches=microbatches),
        donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None),
        compiler_options=compiler_options(mesh, model.config))


Step: TypeAlias = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def own_step(training: Training, plan: Plan) -> Step:
    """A run's step by this package's own trainer."""
    return jit_train_step(plan.model, plan.optimizer, plan.state, len(plan.mixture.order.sources),
                          training.microbatches)


class Runner(NamedTuple):
    """The trainer of a run: its name in provenance.json, and the function that makes the step."""

    name: str
    make_step: Callable[[Training, Plan], Step]


OWN = Runner("own", own_step)


def eval_step(params: Any, batch: Batch, *, model: Decoder, sources: int) -> tuple[jax.Array, jax.Array]:
    """Sums of losses in nats and of tokens for each source: two float32 [sources]."""
    hidden_BLD: Any = model.apply({"params": params}, batch.inputs, batch.positions, batch.segment_ids)
    embedding_VD = output_head(params)
    _, losses_BL = cross_entropy(hidden_BLD, embedding_VD, batch.targets, batch.weights,
                                 chunk=chunk_of(len(batch.inputs), len(embedding_VD), gradients=False))
    return (by_source(losses_BL * batch.weights, batch.sources, sources),
            by_source(batch.weights, batch.sources, sources))


def by_source(values_BL: Array, sources_BL: Array, sources: int) -> jax.Array:
    """Sums of values for each source: float32 [sources]."""
    return jnp.einsum("BL,BLS->S", values_BL, jax.nn.one_hot(sources_BL, sources))


def train(
    training: Training, settings: Callable[[], tuple[str, Mapping[str, str]]] = lambda: ("", {}),
    asked: Mapping[str, str] | None = None,
    profile_steps: ProfileSteps | None = None, runner: Runner = OWN,
) -> Run:
    """Trains to the end, or until a SIGTERM or SIGINT, after which it saves and returns.

    Args:
      training: the settings.
      settings: called when everything is built; the operative configuration as text and as name -> value. The text
        goes to MODEL_DIR/config.gin, the values into every checkpoint, and a resume with others is refused.
      asked: the settings of gin files and flags, name -> value, for MODEL_DIR/provenance.json.
      profile_steps: steps to trace, if any.
      runner: the trainer.

    Raises:
      ValueError: a mistake in the configuration, a MODEL_DIR of another one, or steps to profile that the run lacks.
      FloatingPointError: the loss is not finite.
    """
    with first_process_first():
        plan = make_plan(training, say)
    if profile_steps is not None:
        profile_steps.require_within(plan.last_step)
    say(describe(training, plan) + "\n")
    model_dir = epath.Path(training.model_dir).expanduser()
    text, values = settings()
    require_agreement("order of its data", plan.mixture.order.fingerprint())
    require_agreement("configuration", repr(sorted(values.items())))
    first_process = jax.process_index() == 0
    with (
        alone_in(str(model_dir)) if first_process else contextlib.nullcontext(_held_by_another) as require_held,
        stop_on_signal() as stop,
        Checkpoints(str(model_dir / "checkpoints"), training.keep_last, training.keep_every,
                    kept_steps(training)) as checkpoints,
        jax.set_mesh(plan.mesh),
        nn.logical_axis_rules(training.mesh.all_rules()),
    ):
        run = begin_or_resume(training, plan, checkpoints, values)
        require_agreement("step to go on from", str(run.step))
        if first_process and not run.resumed:
            set_earlier_aside(model_dir, say)
        if first_process and text:
            write_whole(model_dir / "config.gin", text)
        provenance = Provenance(run, values, asked or {}, runner.name, active=first_process)
        status = StatusLine(run.step, plan.last_step, active=first_process)
        records = Records(str(model_dir), run.step, first_process, require_held, status.say,
                          tensorboard="tensorboard" in training.trackers)
        trackers = Trackers(str(model_dir), training.trackers if first_process else (), status.say)
        profile = Profile(profile_steps, run.step, str(model_dir), status.say)
        try:
            loop(run, checkpoints, records, status, values, stop, profile, runner, require_held)
            newest = checkpoints.newest_step()
            kept = {str(step): checkpoints.record(step)["digest"] for step in kept_steps(training)
                    if step in checkpoints.steps()}
            provenance.write(run, None if newest is None else checkpoints.record(newest)["digest"], kept)
        except NotFinite as error:
            checkpoints.wait()
            checkpoints.set_aside_from(error.parameters_after, status.say)
            good = checkpoints.newest_step()
            raise FloatingPointError(
                f"{error} " + ("No checkpoint was saved before. " if good is None else
                               f"The last good checkpoint is step {good} in {model_dir}. ")
                + "A lower learning rate or a longer warm-up may help.") from None
        except OSError:
            require_held()  # a lost directory explains the error
            raise
        finally:
            status.close()
            records.close()
            trackers.close()
    return run


def _held_by_another() -> None:
    """Does nothing: only the first process holds the directory."""


def loop(
    run: Run, checkpoints: Checkpoints, records: Records, status: StatusLine, settings: Mapping[str, str],
    stop: threading.Event, profile: Profile, runner: Runner, require_held: Callable[[], None] = _held_by_another,
) -> None:
    """Trains `run` in place up to the plan's last step. `require_held` is called before each save."""
    training, plan, order = run.training, run.plan, run.plan.mixture.order
    sources, keep_steps = len(order.sources), kept_steps(training)
    step_fn = runner.make_step(training, plan)
    eval_fn = jax.jit(functools.partial(eval_step, model=plan.model, sources=sources),
                      compiler_options=compiler_options(plan.mesh, plan.model.config))
    meter = Meter(order, training.batch_size, plan.mixture.stage, run.step, plan.last_step, training.log_period,
                  jax.jit(training.learning_rate), functools.partial(utilization, plan), records, status, run.interval)
    if run.step == plan.first_step:
        evaluate(run, eval_fn, records, status)
    batches = read_ahead(functools.partial(batch_and_sizes, training, plan), run.step, plan.last_step)
    meter.restart()
    saved = run.step

    def save() -> None:
        nonlocal saved
        meter.settle()
        require_held()
        if not bool(all_finite(run.state.params)):  # after the last step no loss would show it
            raise NotFinite(f"The parameters became infinite or NaN at step {run.step}.", run.step)
        records.settle()
        checkpoints.save(run.step, run.state, {"settings": dict(settings), "ledger": run.ledger.to_json(),
                                               "interval": meter.interval, "place": place(training, plan, run.step),
                                               "held_out": run.held_out,
                                               "vocabulary": vocabulary_facts(training.vocabulary)})
        saved = run.step
        meter.restart()

    def export() -> None:
        meter.settle()
        record = {"settings": dict(settings), "ledger": run.ledger.to_json(), "step": run.step}
        export_while_training(run.state.params, plan.model.config, training.vocabulary, record,
                              f"{resolved(training.model_dir)}/exports/{run.step}", status.say)
        meter.restart()

    try:
        while run.step < plan.last_step and not stops(stop, run.step, training.log_period):
            profile.begin_before(run.step + 1, meter)
            with jax.profiler.StepTraceAnnotation("train", step_num=run.step + 1):
                batch, drawn, sizes = meter.next_batch(batches)
                run.state, metrics = step_fn(run.state, batch)
                run.step += 1
                run.ledger.add(order, drawn.source, sizes.counted)
                meter.add(run.step, metrics, int(sizes.positions.sum()), sum(run.ledger.tokens.values()))
            checkpoints.raise_if_failed()
            profile.end_after(run.step, meter)
            if run.step % training.eval_period == 0 or run.step == plan.last_step or run.step in keep_steps:
                meter.settle()
                evaluate(run, eval_fn, records, status)
                meter.restart()
            # Before the checkpoint, so that a run killed meanwhile exports again.
            if training.export_period and (
                    run.step % training.export_period == 0 or run.step == plan.last_step):
                export()
            if run.step % training.checkpoint_period == 0 or run.step in keep_steps:
                save()
        if run.step > saved:
            save()
    finally:
        batches.close()
        profile.close(run.step)
    checkpoints.wait()
    require_held()
    if run.step > plan.first_step and agreed(int(not checkpoints.is_there(run.step))):
        status.say(f"WARNING: the checkpoint of step {run.step} was removed; it is saved again.")
        checkpoints.reload()
        save()
        checkpoints.wait()
    if run.step < plan.last_step:
        status.say(f"Stopped by a signal; saved after step {run.step}. The same command continues." if run.step
                   else "Stopped by a signal before the first step; nothing is saved.")


@jax.jit
def all_finite(params: Any) -> jax.Array:
    """Whether every number of every array is finite: a bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))


def stops(stop: threading.Event, step: int, log_period: int) -> bool:
    """Whether to stop after `step` steps. A signal may reach only one process, but all must stop after the same step:
    several processes agree at each record, where they wait for each other anyway.
    """
    if jax.process_count() == 1:
        return stop.is_set()
    return step % log_period == 0 and bool(gathered(np.array([stop.is_set()])).any())


@jax.profiler.annotate_function
def batch_of_step(training: Training, plan: Plan, step: int) -> tuple[Batch, Draw]:
    """The batch of step `step`, from 0, and its draw."""
    mixture, sharding = plan.mixture, batch_sharding(plan.mesh)
    if mixture.stage == "tuning":
        return example_batch(step, training.batch_size, mixture.order, mixture.training, plan.rows,
                             training.mixture.packing, sharding)
    return global_batch(step, training.batch_size, mixture.order, mixture.training,
                        training.vocabulary.end_of_document_id, sharding)


def batch_and_sizes(training: Training, plan: Plan, step: int) -> tuple[Batch, Draw, Sizes]:
    """The result of `batch_of_step`, and the sizes of the drawn rows, which may have to be read for this."""
    batch, drawn = batch_of_step(training, plan, step)
    return batch, drawn, plan.mixture.sizes(drawn)


@jax.profiler.annotate_function
def evaluate(run: Run, eval_fn: Callable[..., Any], records: Records, status: StatusLine) -> None:
    """Records and shows held-out losses and benchmarks. At its first step a branch takes over its trunk's losses."""
    found, of_what = run.held_out, held_out_rows(run)
    if not found or (found["step"], found["of"]) != (run.step, of_what):
        found = run.held_out = {"step": run.step, "of": of_what, "losses": held_out(run, eval_fn)}
    losses = dict(found["losses"])
    if not math.isfinite(losses.get("loss", 0.0)):
        raise NotFinite(f"The held-out loss became {losses['loss']} at step {run.step}.", run.step)
    scores, failures = ask_benchmarks(run)
    if losses or scores:
        measured = {name: result for name, result in scores.items() if result.get("measured", True)}
        records.write(run.step, "eval", losses | {name: result["value"] for name, result in measured.items()} | {
            f"answer_{measure}/{name.removeprefix('score/')}": found["value"] for name, result in measured.items()
            for measure, found in result.get("measures", {}).items()})
    if losses:
        nats, bits = (", ".join(f"{pool} {losses[f'{measure}/{pool}']:.4f}" for pool in POOLS
                                if f"{measure}/{pool}" in losses) for measure in ("loss", "bits_per_byte"))
        status.say(f"held-out loss after step {run.step}: {nats}" + f"; in bits per byte: {bits}" * bool(bits))
    if scores:
        shown = [f"{name.removeprefix('score/')} {short_score(result)}" for name, result in scores.items()]
        status.say(f"benchmarks after step {run.step}, in per cent: {', '.join(shown)}")
    for failure in failures:
        status.say(f"WARNING: a benchmark failed after step {run.step}: {failure}")


def held_out_rows(run: Run) -> dict[str, Any]:
    """Everything that held-out losses depend on besides the parameters, as JSON."""
    rows = zip(run.plan.mixture.order.sources, run.plan.mixture.validation, strict=True)
    return {"eval_rows": run.training.eval_rows, "rows": {
        source.name: of_source and of_source.content_hash for source, of_source in rows}}


def held_out(run: Run, eval_fn: Callable[..., Any]) -> dict[str, float]:
    """Loss of each source and each pool on the first rows of its validation split, in nats per token and in bits per
    byte; empty if there are none.

    Bits per byte are the nats of all tokens that the loss counts, including ends of documents, over ln 2, over the
    bytes of their text (`Vocabulary.bytes_behind`).
    """
    training, plan, order = run.training, run.plan, run.plan.mixture.order
    losses, tokens, sizes = np.zeros((3, len(order.sources)))
    for index, rows in enumerate(plan.mixture.validation):
        if rows is None:
            continue
        for batch in held_out_batches(rows, training.eval_rows, plan.rows, index,
                                      training.vocabulary.end_of_document_id, batch_sharding(plan.mesh),
                                      plan.mixture.stage):
            loss, count = jax.device_get(eval_fn(run.state.params, batch))
            losses, tokens = losses + loss, tokens + count
        sizes[index] = held_out_bytes(rows, training.eval_rows, training.vocabulary, plan.mixture.stage)
    if not tokens.sum():
        return {}
    names = [source.name for source in order.sources]
    return {"loss": losses.sum() / tokens.sum(), "tokens": tokens.sum()} | loss_by_source(
        losses, tokens, names) | bits_per_byte_by_source(losses, sizes, names)


def ask_benchmarks(run: Run) -> tuple[dict[str, dict[str, Any]], list[TaskFailed]]:
    """Results of the benchmarks, {"score/logic": ...}, with files in results/in_training/STEP, and the failures."""
    training, plan = run.training, run.plan
    if training.evaluation is None or not plan.questions:
        return {}, []
    folder = epath.Path(training.model_dir).expanduser() / "results" / "in_training" / str(run.step)
    if jax.process_index() == 0 and folder.exists():
        folder.rmtree()  # left by a run that was killed after its last checkpoint, or by an earlier run
    model = TrainedModel(run.state.params, plan.model.config, training.vocabulary, plan.mesh)
    checkpoint = {"run": resolved(training.model_dir), "step": run.step, "arm": arm(run.ledger.to_json())}
    results, failures = ask(training.evaluation, plan.questions, model, checkpoint, str(folder),
                            report=lambda lines: None, progress=False)
    return {f"score/{result['task']}{'_sample' * result['sample']}": result for result in results}, failures


def utilization(plan: Plan, tokens_per_second: float) -> tuple[float | None, float | None]:
    """Model FLOPs over the devices' peak, counting full and causal attention; None if the peak is unknown."""
    peak = peak_flops()
    if peak is None:
        return None, None
    full, causal = (flops_per_token(plan.model.config, causal=causal) for causal in (False, True))
    return full * tokens_per_second / (peak * plan.mesh.size), causal * tokens_per_second / (peak * plan.mesh.size)


def summary(run: Run) -> str:
    """The results of a run, for its last lines on the terminal."""
    evaluations = [line for line in read_records(run.training.model_dir) if line["split"] == "eval"]
    lines = ["", f"{run.step} of {run.plan.last_step} steps are done.", ""]
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        lines.append(f"{'held-out loss, nats/token':<28} {'step ' + str(first['step']):>12} "
                     f"{'step ' + str(last['step']):>12}")
        lines += [f"  {pool:<26} {first[f'loss/{pool}']:>12.4f} {last[f'loss/{pool}']:>12.4f}"
                  for pool in POOLS if f"loss/{pool}" in last]
        lines += [f"  {pool + ', bits per byte':<26} {first[name]:>12.4f} {last[name]:>12.4f}"
                  for pool in POOLS if (name := f"bits_per_byte/{pool}") in last and name in first]
        lines += [f"  {name.removeprefix('score/') + ', %':<26} {100 * first[name]:>12.2f} {100 * last[name]:>12.2f}"
                  for name in last if name.startswith("score/") and name in first]
        lines.append("")
    order = run.plan.mixture.order
    repeated = [f"WARNING: {source.name} was repeated {run.ledger.rows[source.name] / source.rows:.1f} times."
                for source in order.sources if run.ledger.rows[source.name] > MANY_EPOCHS * source.rows]
    before = [f"before: {saved['stage']}, {saved['step']} steps in {saved['model_dir']}"
              for saved in run.ledger.before]
    phases = [run.ledger.table_of_phases(order), ""] if len(run.ledger.phases) > 1 else []
    return "\n".join([*lines, run.ledger.table(order), *repeated, "", *phases, *before,
                      f"arm of the study: {arm(run.ledger.to_json())}", ""])

