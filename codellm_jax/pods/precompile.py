"""`t5x precompile`: whether a run fits on TPUs that are not attached, its traffic between them, and its best speed."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator

from codellm_jax.model.decoder import REMAT_POLICIES, flops_per_token, parameter_count
from codellm_jax.pods.programs import (
    Outcome,
    compile_decoding,
    compile_scoring,
    compile_train_step,
    compiled_with,
    lay_out,
    replicated_leaves,
    with_slices,
)
from codellm_jax.pods.roofline import ASSUMPTIONS, ESTIMATED, Estimate, estimate, roofline
from codellm_jax.pods.topologies import Topology, topology_names
from codellm_jax.runtime.state import bytes_per_device
from codellm_jax.training.plan import GIB, Training, memory_parts

FINENESS = 8  # the largest batch is determined to within 1 / FINENESS
# The most programs compiled in a search for the largest batch; a refused program takes seconds and is not counted.
MOST_COMPILED = 4


def precompile(
    training: Training, topology: Topology, *, title: str = "", scoring: bool = False, decoding: bool = False,
    search: bool = True, other: tuple[str, Training] | None = None, report: Callable[[str], None] = print,
) -> tuple[bool, str]:
    """Compiles a run's programs for a topology.

    Args:
      training: the settings of the run.
      topology: the target of the compilation.
      title: the name of the run in the report.
      scoring, decoding: whether to compile these in addition to the train step.
      search: whether to search for the largest batch, or, if the step does not fit, for changes that make it fit.
      other: flags, and the run that results from them: its train step is also compiled, and compared.
      report: called with progress messages.

    Returns:
      Whether all programs of `training` fit, and a page of Markdown.

    Raises:
      ValueError: with a one-line message, if the settings do not fit together or do not fit the topology.
    """
    training = with_slices(training, topology)
    step = compile_train_step(training, topology)
    report(f"train step: {_fits(step)}")
    outcomes = [step]
    for wanted, compile_program in ((scoring, compile_scoring), (decoding, compile_decoding)):
        if wanted:
            outcomes.append(compile_program(training, topology))
            report(f"{outcomes[-1].program}: {_fits(outcomes[-1])}")
    compared = None
    if other is not None:
        compared = compile_train_step(with_slices(other[1], topology), topology)
        report(f"train step with {other[0]}: {_fits(compared)}")
    lines = [f"# {title or 'A run'} on {topology.name}", "", *_what(step), "", *_memory_table(outcomes), ""]
    lines += [f"The {one.program} does not fit: {one.refusal}." for one in outcomes if one.memory is None]
    if other is not None and compared is not None:
        lines += [*_comparison_section(step, other[0], compared), ""]
    if topology.generation == "gpu":
        lines += [*_card_section(step), ""]
    if step.memory is None and search:
        lines += _changes_section(step, report)
    if step.memory is not None:
        if search:
            lines += [_largest_sentence(*largest_batch(step, report)), ""]
        if topology.generation != "gpu":
            lines += [*_roofline_section(step), "", *_estimate_section(step), ""]
    for one in outcomes:
        if one.memory is not None:
            lines += [*_traffic_section(one), ""]
    lines += _replicated_section(training, topology)
    return all(one.memory is not None for one in outcomes), "\n".join(lines).rstrip() + "\n"


def chips_of(topology: Topology) -> str:
    """A topology in words: 64 chips, 4 x 4 x 4; or 2 cards."""
    if topology.generation == "gpu":
        return f"{topology.chips} card{'s' if topology.chips > 1 else ''}"
    words = [f"{topology.chips} chip{'s' if topology.chips > 1 else ''}",
             (f"{topology.slices} slices of " if topology.slices > 1 else "") + " x ".join(map(str, topology.shape))]
    if topology.chip.devices > 1:
        words.append(f"{topology.chip.devices} devices each")
    return ", ".join(words)


def largest_batch(outcome: Outcome, report: Callable[[str], None]) -> tuple[int, int | None]:
    """The largest BATCH_SIZE that fits, and the smallest that was refused; None if none was.

    The search covers the multiples that the mesh and the microbatches divide, and ends when the two are within an
    eighth of each other or MOST_COMPILED programs have been compiled.

    Args:
      outcome: the result for a train step that fits.
      report: called for each attempt.
    """
    training, memory = outcome.training, outcome.memory
    assert memory is not None
    unit = outcome.mesh.shape["data"] * outcome.mesh.shape["fsdp"] * training.microbatches
    fitting, refused, compiled = outcome.rows // unit, None, 0
    room = outcome.topology.chip.memory_gib * GIB - memory.arguments
    # The first guess assumes that everything but the arguments grows with the batch, which is too low; the batch is
    # then doubled, then the gap is halved.
    trial = max(fitting + 1, math.floor(fitting * room / max(1, memory.peak - memory.arguments)))
    while compiled < MOST_COMPILED and (refused is None or refused - fitting > max(1, fitting // FINENESS)):
        found = compile_train_step(dataclasses.replace(training, batch_size=trial * unit), outcome.topology)
        report(f"batch of {trial * unit}: {_fits(found)}")
        if found.memory is None:
            refused = trial
        else:
            fitting, compiled = trial, compiled + 1
        trial = fitting * 2 if refused is None else (fitting + refused) // 2
    return fitting * unit, None if refused is None else refused * unit


def _fits(outcome: Outcome) -> str:
    if outcome.memory is None:
        return "does not fit"
    return f"{outcome.memory.peak / GIB:.2f} GiB, {outcome.seconds:.0f} s to compile"


def changes(outcome: Outcome) -> Iterator[tuple[str, Training, Topology]]:
    """Changes that may make a train step fit, in this order: costs in time, changes of the training, more chips.

    More sharding costs traffic; keeping less costs up to a third more computation, and finally traffic with the host;
    microbatches gather parameters more often; splitting the model causes traffic in every layer. A smaller batch is a
    different run.
    """
    training, topology, mesh, config = outcome.training, outcome.topology, outcome.mesh, outcome.config
    data, model = mesh.shape["data"], mesh.shape["model"]
    rows = outcome.rows // (data * mesh.shape["fsdp"])
    if data > training.mesh.slices:
        sizes = {"data": training.mesh.slices, "fsdp": -1, "model": model}
        yield (f"--gin.mesh.data={training.mesh.slices} --gin.mesh.fsdp=-1",
               dataclasses.replace(training, mesh=dataclasses.replace(training.mesh, **sizes)), topology)
    policies = list(REMAT_POLICIES)
    for remat in policies[policies.index(config.remat) + 1:]:
        yield (f"--gin.model.remat={remat}",
               dataclasses.replace(training, model=functools.partial(training.model, remat=remat)), topology)
    parts = training.microbatches
    while (parts := 2 * parts) <= rows:
        if rows % parts == 0:
            yield f"--gin.train.microbatches={parts}", dataclasses.replace(training, microbatches=parts), topology
    for more in (2 * model, 4 * model, 8 * model):
        rest = mesh.size // data // more
        if config.key_heads % more == 0 and rest and mesh.size % (data * more) == 0:
            sizes = {"data": data, "fsdp": rest, "model": more}
            yield (f"--gin.mesh.data={data} --gin.mesh.fsdp={rest} --gin.mesh.model={more}",
                   dataclasses.replace(training, mesh=dataclasses.replace(training.mesh, **sizes)), topology)
    batch_size = training.batch_size
    while batch_size % 2 == 0 and (batch_size := batch_size // 2):
        yield f"--gin.BATCH_SIZE={batch_size}", dataclasses.replace(training, batch_size=batch_size), topology
    for name, larger in topology_names().items():
        chips = larger.chips * topology.slices
        if larger.generation == topology.generation and chips > topology.chips and not chips & (chips - 1):
            prefix = f"{topology.slices}x" if topology.slices > 1 else ""
            yield (f"--topology={prefix}{name}", training,
                   dataclasses.replace(larger, name=prefix + name, slices=topology.slices))


def cheapest_changes(
    outcome: Outcome, report: Callable[[str], None], wanted: int = 2
) -> list[tuple[str, Outcome]]:
    """The first of `changes` that make a refused train step fit, each compiled."""
    found: list[tuple[str, Outcome]] = []
    for flags, training, topology in changes(outcome):
        if len(found) == wanted:
            break
        try:
            state = lay_out(training, topology)[2]
            least = bytes_per_device(state) + bytes_per_device(state.params)
            if least > topology.chip.memory_gib * GIB:  # state and gradients alone do not fit
                continue
            tried = compile_train_step(training, topology)
        except ValueError:  # the sizes are not divisible that way
            continue
        report(f"{flags}: {_fits(tried)}")
        if tried.memory is not None:
            found.append((flags, tried))
    return found


# The page of the report.


def _what(step: Outcome) -> list[str]:
    config, training = step.config, step.training
    tokens = step.rows * training.mixture.length
    full, causal = (flops_per_token(config, causal=causal) * tokens for causal in (False, True))
    slices = f", mesh.slices={training.mesh.slices}" if training.mesh.slices > 1 else ""
    parts = f" in {training.microbatches} microbatches" if training.microbatches > 1 else ""
    keys = f" on {config.key_heads} of keys" if config.key_heads < config.heads else ""
    return [
        f"- {chips_of(step.topology)}; mesh " + " x ".join(f"{axis} {size}" for axis, size in step.mesh.shape.items())
        + slices,
        f"- {parameter_count(config):,} parameters: {config.layers} layers of {config.hidden}, {config.heads} heads of "
        f"{config.size_of_head}{keys}, vocabulary {config.vocabulary_size:,}; {config.dtype}, remat {config.remat}, "
        f"attention {config.attention}",
        f"- {step.rows} rows of {training.mixture.length}{parts}: {tokens:,} tokens, {full:.4g} model FLOPs a step "
        f"({causal:.4g} if causal attention counts as half)",
        f"- compiled by {compiled_with(step)}",
    ]


def _memory_table(outcomes: list[Outcome]) -> list[str]:
    lines = ["| GiB per device | arguments | temporaries | total | peak | of | compiled in |",
             "|---|---|---|---|---|---|---|"]
    for one in outcomes:
        memory = ["", "", "", "does not fit"] if one.memory is None else [f"{size / GIB:.2f}" for size in (
            one.memory.arguments, one.memory.temporaries, one.memory.total, one.memory.peak)]
        lines.append(f"| {one.program} | {' | '.join(memory)} | {one.topology.chip.memory_gib:.2f} | "
                     f"{one.seconds:.0f} s |")
    return lines


def _largest_sentence(fitting: int, refused: int | None) -> str:
    return f"Largest batch that fits: {fitting}" + (
        f"; {refused} does not." if refused else "; a larger one was not tried.")


def _changes_section(step: Outcome, report: Callable[[str], None]) -> list[str]:
    found = cheapest_changes(step, report)
    lines = ["", "These tried configurations fit, the cheapest first:" if found else "No tried configuration fits.", ""]
    for flags, tried in found:
        assert tried.memory is not None
        lines.append(f"- `{flags}`: {tried.memory.peak / GIB:.2f} of {tried.topology.chip.memory_gib:.2f} GiB")
    return [*lines, ""]


def _roofline_section(step: Outcome) -> list[str]:
    assert step.memory is not None
    tokens = step.rows * step.training.mixture.length
    found = roofline(step.config, tokens, step.topology, step.mesh.devices.flat[0].device_kind, step.mesh.size,
                     step.memory.arguments, step.memory.temporaries, step.traffic)
    return [
        "| seconds per step, at least | computing | memory | links | network | overlapped | in turn |",
        "|---|---|---|---|---|---|---|",
        f"| | {' | '.join(f'{seconds:.4f}' for seconds in found[:-1])} |", "",
        f"At best {tokens / found.overlapped / step.mesh.size:,.0f} tokens/s per device, {found.utilization:.0%} of "
        "the peak in model FLOPs. Assumed:", "", *(f"- {assumption}" for assumption in ASSUMPTIONS)]


def _card_section(step: Outcome) -> list[str]:
    parts = memory_parts(step.training, lay_out(step.training, step.topology))
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return [
        f"By calculation, which gives the peak above and decides, a card needs about {sum(parts.values()) / GIB:.2f} "
        f"GiB: {listed}. This excludes libraries, collectives and gaps between arrays.", "",
        "The other columns come from XLA's analysis of the step compiled for this machine's processor, which replaces "
        "the cards: its attention differs, and it computes some bfloat16 operations in float32. All are estimates. JAX "
        "takes three quarters of a card at the start unless XLA_PYTHON_CLIENT_MEM_FRACTION is set: choose --memory "
        "accordingly."]


def _estimate(step: Outcome) -> Estimate:
    return estimate(step.config, step.rows * step.training.mixture.length, step.topology,
                    step.mesh.devices.flat[0].device_kind, step.mesh.size, step.parts, step.has_kernels)


def _estimate_section(step: Outcome) -> list[str]:
    found, tokens = _estimate(step), step.rows * step.training.mixture.length
    return [
        "| seconds per step, estimated | computing | attention | waiting for links | links beside computing | step |",
        "|---|---|---|---|---|---|",
        f"| | {' | '.join(f'{seconds:.4f}' for seconds in found[:-1])} |", "",
        f"By this estimate (not a measurement), {tokens / found.step / step.mesh.size:,.0f} tokens/s per device, "
        f"{found.utilization:.0%} of the peak in model FLOPs. Assumed:", "",
        *(f"- {assumption}" for assumption in ESTIMATED)]


def _comparison_section(step: Outcome, flags: str, other: Outcome) -> list[str]:
    """Both train steps side by side; nothing is known about one that does not fit."""

    def rows(one: Outcome) -> list[float]:
        if one.memory is None:
            return []
        sent, beside = (sum(getattr(traffic, name) for traffic in one.traffic) for name in ("sent", "asynchronous"))
        sizes = [size / GIB for size in (one.memory.peak, one.memory.arguments, one.memory.temporaries, sent, beside)]
        if one.topology.generation == "gpu":
            return sizes[:-1]
        found, tokens = _estimate(one), one.rows * one.training.mixture.length
        return [*sizes, *found[:-1], tokens / found.step / one.mesh.size, 100 * found.utilization]

    names = ("peak, GiB per device", "arguments, GiB", "temporaries, GiB", "sent, GiB", "of that asynchronous, GiB",
             "computing, s", "attention, s", "waiting for links, s", "links beside computing, s", "estimated step, s",
             "tokens/s per device", "model FLOPs, % of the peak")
    lines = ["", f"| train step | this run | with `{flags}` | second / first |", "|---|---|---|---|"]
    compared = rows(step), rows(other)
    for name, first, second in itertools.zip_longest(names[:max(map(len, compared)) or 1], *compared):
        cells = ["does not fit" if value is None else f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
                 for value in (first, second)]
        lines.append(f"| {name} | {' | '.join(cells)} | {f'{second / first:.2f}' if first and second else ''} |")
    return lines


def _traffic_section(one: Outcome) -> list[str]:
    lines = [f"| {one.program} sends | along | operations | GiB per device | of that while it computes |",
             "|---|---|---|---|---|"]
    lines += [f"| {kind} | {', '.join(axes)} | {operations:,} | {sent / GIB:.3f} | {beside / GIB:.3f} |"
              for kind, axes, operations, sent, beside in one.traffic]
    if not one.traffic:
        return [f"The {one.program} sends nothing between devices."]
    if one.unknown_loops:
        lines += ["", f"{one.unknown_loops} loop(s) have a data-dependent number of iterations; they are counted as "
                      "one."]
    return lines


def _replicated_section(training: Training, topology: Topology) -> list[str]:
    leaves = replicated_leaves(training, topology)
    if not leaves:
        return ["Every parameter and optimizer leaf that an axis of the mesh divides is sharded along it."]
    total = sum(size for *_, size in leaves)
    return [f"Replicated although they could be sharded: {sum(count for *_, count, _ in leaves)} leaves, "
            f"{total / 2**20:.1f} MiB per device.", "", "| leaf | shape | along | copies | MiB per device |",
            "|---|---|---|---|---|",
            *(f"| {name} | {' x '.join(map(str, shape))} | {axes} | {count} | {size / 2**20:.3f} |"
              for name, shape, axes, count, size in leaves)]
