"""The `t5x` command.

    t5x train --gin_file=gin/mixed_pretrain.gin --gin.CODE_RATE=0.5

T5X has no release on PyPI; this package owns the command and keeps T5X's flags.
"""

import argparse
import importlib
import os
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codellm_jax.flags import overrides_of, parser, refusal, without, words_of
from codellm_jax.runtime.terminal import (
    escape_what_cannot_be_encoded,
    interruptible,
    one_line,
    outlive_the_terminal,
    quiet_libraries,
    to_nowhere,
)

# Their results are in files, so they continue when nobody reads their output.
LASTING = ("train", "eval", "study", "cache", "prepare", "report", "laws", "plot", "vocabulary", "launch", "import",
           "export", "fetch", "adopt")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a sub-command; returns the exit status. A user's mistake gives one line on stderr and status 2 or 1."""
    escape_what_cannot_be_encoded()
    whole = parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        from codellm_jax.completion import complete

        complete(whole)
    # A flag with an optional value would consume a --gin. flag that contains a space.
    given = ["--print_commands=shell" if argument == "--print_commands" else argument
             for argument in (sys.argv[1:] if arguments is None else arguments)]
    job: list[str] = []
    if given[:1] in (["launch"], ["cache"], ["prepare"]) and "--" in given:
        given, job = given[:given.index("--")], given[given.index("--") + 1:]
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "train": _train, "eval": _eval, "study": _study, "infer": _infer, "compare": _compare, "report": _report,
        "explain": _explain, "contamination": _contamination, "cache": _cache,
        "prepare": _prepare, "vocabulary": _vocabulary, "import": _import, "export": _export, "launch": _launch,
        "precompile": _precompile, "fetch": _fetch,
        "adopt": lambda flags: _print("upstream.command", "adopt", flags, _search_paths(flags)),
        "show": lambda flags: _print("watching.show", "show", flags.path, _tool("t5x")),
        "laws": lambda flags: _print("report.law_files", "laws", flags.directory, flags.objective, flags.size,
                                     flags.tokens, flags.predict),
        "plot": lambda flags: _print("report.curves", "plot", flags.runs, flags.output, flags.against),
        "list": lambda flags: _print("reference.printed", "listing", flags.kind),
        "settings": lambda flags: _print("reference.printed", "settings_page", flags.word)}
    if said := refusal(given, commands):
        return _fail("t5x", said, 2)
    flags, rest = whole.parse_known_args(given)
    if flags.command is None:
        whole.print_help()
        return 2
    try:
        if flags.command in LASTING:
            outlive_the_terminal()
        flags.overrides = overrides_of(rest)
        flags.job = job
        if getattr(flags, "local_processes", None) is not None:
            from codellm_jax.runtime.supervision import run_local_processes

            return run_local_processes(without(given, "--local_processes"), flags.local_processes)
        if flags.command in ("train", "eval"):
            status = _with_others(flags)
            if status is not None:
                return status
        with interruptible():
            return _leave(commands[flags.command](flags))
    except BrokenPipeError:  # of a command that only prints, such as explain ... | head
        to_nowhere(1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _leave(_fail(f"t5x {flags.command}", "interrupted.", 130))
    except Exception as error:
        if flags.debug:
            traceback.print_exc()
        return _leave(_fail(f"t5x {flags.command}", one_line(error), 1))


def _print(module: str, function: str, *arguments: Any) -> int:
    """Prints the result of a function of a module of this package."""
    print(getattr(importlib.import_module(f"codellm_jax.{module}"), function)(*arguments))
    return 0


def _with_others(flags: argparse.Namespace) -> int | None:
    """Joins the other processes of a run, if any, in a child; returns the exit status in the watching process."""
    from codellm_jax.runtime.supervision import has_others, watched

    given = [flags.coordinator_address, flags.process_count, flags.process_index]
    if not has_others() and given == [None, None, None]:
        return None
    status = watched(flags.command)
    if status is None:
        from codellm_jax.runtime.distributed import join

        join(flags.coordinator_address, flags.process_count, flags.process_index, flags.heartbeat_seconds)
    return status


def _leave(status: int) -> int:
    """The exit status, after informing the other processes, if any."""
    if distributed := sys.modules.get("codellm_jax.runtime.distributed"):
        distributed.leave(status)
    return status


def _configuration(flags: argparse.Namespace) -> Any:
    from codellm_jax.configuration import read_configuration, read_settings

    if not flags.gin_file:
        if flags.command in ("study", "eval", "infer", "prepare"):
            raise ValueError(f"no --gin_file is given; gin/{flags.command}.gin is the file to start with.")
        raise ValueError(f"no --gin_file is given. To begin: t5x {flags.command} --gin_file=gin/mixed_pretrain.gin"
                         + (" (add --dry_run to see the plan first) trains in minutes on data that every Python "
                            "installation has. "
                            "--gin.NAME=VALUE changes a setting; t5x train --help has examples."
                            if flags.command == "train" else "."))
    read = read_settings if getattr(flags, "status", False) else read_configuration
    return read(flags.gin_file, flags.overrides, _search_paths(flags))


def _search_paths(flags: argparse.Namespace) -> tuple[str, ...]:
    return tuple(path for path in flags.gin_search_paths.split(",") if path)


def _train(flags: argparse.Namespace) -> int:
    from codellm_jax.runtime.process import keep_freed_memory, use_compilation_cache
    from codellm_jax.runtime.profiles import parse_profile_steps

    keep_freed_memory()
    profile_steps = None if flags.profile_steps is None else parse_profile_steps(flags.profile_steps)
    configuration = _configuration(flags)
    from codellm_jax.configuration import build, operative
    from codellm_jax.runtime.progress import say
    from codellm_jax.study.arms import other_arm
    from codellm_jax.training.plan import describe, make_plan
    from codellm_jax.training.train import summary, train
    from codellm_jax.upstream.runners import runner

    whose = runner(flags.runner)
    use_compilation_cache()
    if not flags.debug:
        quiet_libraries()
    training = build(configuration, "train")
    if flags.dry_run:
        plan = make_plan(training)
        if profile_steps is not None:
            profile_steps.require_within(plan.last_step)
        say(operative(configuration)[0])
        say(describe(training, plan))
        return 0
    run = train(training, settings=lambda: operative(configuration), asked=configuration.asked,
                profile_steps=profile_steps, runner=whose)
    say(summary(run))
    say(f"The run:     {training.model_dir}")
    say(f"Look at it:  {_tool('tensorboard')} --logdir {shlex.quote(training.model_dir)}")
    if run.step == run.plan.last_step:
        if training.mixture.stage == "pretraining":
            say(f"Next:        {_tool('t5x')} train --gin_file=gin/tune_mixed.gin "
                  f"--gin.INITIAL_CHECKPOINT_PATH={shlex.quote(training.model_dir)}")
        other = other_arm(flags.gin_file, flags.overrides, training.mixture.stage)
        say(f"Compare:     {_tool('t5x')} train {shlex.join(other)}")
    return 0


def _eval(flags: argparse.Namespace) -> int:
    configuration = _configuration(flags)
    import jax

    from codellm_jax.configuration import build, operative
    from codellm_jax.evaluation.evaluate import evaluate
    from codellm_jax.runtime.process import use_compilation_cache
    from codellm_jax.tracking.trackers import catch_up

    use_compilation_cache()
    if not flags.debug:
        quiet_libraries()
    evaluation = build(configuration, "evaluate")
    evaluate(evaluation, settings=lambda: operative(configuration)[1], asked=configuration.asked)
    if jax.process_index() == 0:
        catch_up(evaluation.checkpoint.path)
    return 0


def _study(flags: argparse.Namespace) -> int:
    configuration = _configuration(flags)
    if flags.status:
        from codellm_jax.study.status import directory_of, status

        print(status(directory_of(configuration)))
        return 0
    from codellm_jax.study.execute import Options, study

    again = [f"--{name}={value}" for name in ("gin_file", "arm", "seed") for value in getattr(flags, name)]
    if flags.gin_search_paths:
        again.append(f"--gin_search_paths={flags.gin_search_paths}")
    again += [f"--gin.{name}={value}" for name, value in flags.overrides]
    return study(configuration, Options(
        tuple(flags.arm), tuple(flags.seed), _search_paths(flags), flags.redo, flags.dry_run, flags.print_commands,
        flags.worker, flags.devices_per_run, flags.lease_seconds, ("study", *again)))


def _infer(flags: argparse.Namespace) -> int:
    if flags.instruction:
        flags.overrides.append(("infer.template", "@instruction_prompt"))
    configuration = _configuration(flags)
    from codellm_jax.configuration import build
    from codellm_jax.evaluation.infer import answer
    from codellm_jax.runtime.process import use_compilation_cache

    use_compilation_cache()
    if not flags.debug:
        quiet_libraries()
    answer(build(configuration, "infer"), flags.prompts, flags.output)
    return 0


def _compare(flags: argparse.Namespace) -> int:
    from codellm_jax.evaluation.compare import compare, stages, table

    print(table(compare(flags.first, flags.second), flags.first, flags.second))
    if told := stages(flags.first, flags.second):
        print(f"\n{told}")
    return 0


def _contamination(flags: argparse.Namespace) -> int:
    if flags.gin_file:  # first, so that the arm's files and the flags override it
        flags.gin_file.insert(0, "gin/contamination.gin")
    configuration = _configuration(flags)
    _require_directory(flags.output)
    if not {"mixture.name", "vocabulary.path"} <= configuration.effective.keys():
        raise ValueError("no --gin_file names a mixture: add the gin file of an arm, such as gin/mixed_pretrain.gin.")
    from codellm_jax.configuration import build
    from codellm_jax.evaluation.contamination import measure, measure_into, mixtures_behind, table

    contamination = build(configuration, "contamination")
    mixtures = [(build(configuration, "mixture"), build(configuration, "vocabulary")), *mixtures_behind(configuration)]
    print(table(measure_into(flags.output, contamination, mixtures) if flags.output else
                measure(contamination, mixtures)))
    return 0


def _report(flags: argparse.Namespace) -> int:
    if flags.serve:
        from codellm_jax.watching.serve import serve

        return serve(flags.directory, flags.host, flags.port)
    if not flags.debug:
        quiet_libraries()
    from codellm_jax.tracking.trackers import catch_up

    _print("report.write", "report", flags.directory)
    catch_up(flags.directory)
    return 0


def _tool(name: str) -> str:
    """How to type a command of this environment: its name if PATH finds it, else its relative path."""
    return name if shutil.which(name) else os.path.relpath(Path(sys.executable).parent / name)


def _explain(flags: argparse.Namespace) -> int:
    from codellm_jax.configuration import build, explain

    configuration = _configuration(flags)
    if flags.name is None:
        from codellm_jax.settings import listed

        print(listed(configuration))
    elif "study.directory" in configuration.effective:
        from codellm_jax.study.stages import explain_in_study

        print(explain_in_study(build(configuration, "study"), configuration, flags.name, _search_paths(flags)))
    else:
        print(explain(configuration, flags.name))
    return 0


def _vocabulary(flags: argparse.Namespace) -> int:
    configuration = _configuration(flags)
    _require_directory(flags.output)
    if not flags.output.endswith(".model") or flags.size < 1:
        raise ValueError(f"--output must end in .model and --size be positive, found {flags.output}, {flags.size}.")
    from codellm_jax.configuration import build
    from codellm_jax.mixture.mixture import vocabulary_documents
    from codellm_jax.vocabulary import train_vocabulary

    vocabulary = train_vocabulary(vocabulary_documents(build(configuration, "mixture")), flags.size, flags.output)
    print(f"{vocabulary.path}: {vocabulary.pieces} pieces, {vocabulary.content_hash[:12]}. "
          f"Use it with --gin.VOCABULARY={vocabulary.path}")
    return 0


def _require_directory(file: str | None) -> None:
    if file and "://" not in file and not Path(file).expanduser().parent.is_dir():
        raise FileNotFoundError(f"{file} cannot be written: its directory does not exist.")


def _cache(flags: argparse.Namespace) -> int:
    configuration = _configuration(flags)
    from codellm_jax.configuration import build
    from codellm_jax.training.cache import cache

    training = build(configuration, "train")
    cache(training.mixture, training.vocabulary, flags.runner, flags.job, lambda line: print(line, flush=True))
    return 0


def _fetch(flags: argparse.Namespace) -> int:
    from codellm_jax.fetching.fetch import fetch

    fetch(flags.names, flags.data_dir, lambda line: print(line, flush=True))
    return 0


def _prepare(flags: argparse.Namespace) -> int:
    configuration = _configuration(flags)
    from codellm_jax.configuration import build

    build(configuration, "prepare").run(flags.workers, flags.runner, flags.job)
    return 0


def _export(flags: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, which would occupy accelerators needlessly
    from codellm_jax.weights.exporting import export

    if not flags.debug:
        quiet_libraries()
    export(flags.run, flags.output, flags.dtype, flags.max_shard_size, flags.vocabulary)
    return 0


def _import(flags: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported: no accelerator is needed
    from codellm_jax.weights.checking import TOLERANCE, largest_difference, require_transformers
    from codellm_jax.weights.importing import import_run

    if not flags.debug:
        quiet_libraries()
    if flags.check:
        require_transformers()  # before reading for hours
    source = import_run(flags.source, flags.output, flags.vocabulary)
    if flags.check:
        difference = largest_difference(source, flags.output)
        print(f"Largest difference between these logits and those of transformers: {difference:.2e}", flush=True)
        if not difference <= TOLERANCE:  # NaN, too
            return _fail("t5x import", f"logits differ by {difference:.2e} from those of transformers, and "
                         f"{TOLERANCE:g} is allowed: {flags.output} does not hold that model.", 1)
    print(f"Train on:    {_tool('t5x')} train --gin_file=gin/continue_pretrain.gin "
          f"--gin.INITIAL_CHECKPOINT_PATH={shlex.quote(flags.output)}")
    print(f"Evaluate it: {_tool('t5x')} eval --gin_file=gin/eval.gin --gin.CHECKPOINT_PATH={shlex.quote(flags.output)}")
    return 0


def _launch(flags: argparse.Namespace) -> int:
    from codellm_jax.pods.job import (
        VERBS,
        Job,
        accelerator,
        default_name,
        require_one_host,
        require_reachable,
        source,
    )
    from codellm_jax.pods.launch import commands, launch

    tpu = accelerator(flags.tpu)
    if not flags.job or flags.job[0] not in VERBS:
        raise ValueError(f"the command for the TPUs follows -- and is one of {', '.join(VERBS)}: "
                         "t5x launch ... -- train --gin_file=FILE --gin.MODEL_DIR=gs://BUCKET/RUN")
    command, rest = parser().parse_known_args(flags.job)
    command.overrides = overrides_of(rest)
    configuration = _configuration(command)
    from codellm_jax.configuration import require_types
    from codellm_jax.settings import shipped_gin_files

    def reachable(verb: str, files: Sequence[str], asked: Any) -> str:
        return require_reachable(verb, files, _search_paths(command), {
            name: setting.value for name, setting in asked.effective.items()}, list(shipped_gin_files()))

    require_types(configuration)
    run = reachable(command.command, command.gin_file, configuration)
    if command.command == "study":
        from codellm_jax.study.execute import study_of
        from codellm_jax.study.planned import planned_runs

        require_one_host(tpu)
        for one in planned_runs(study_of(configuration), configuration, _search_paths(command))[0]:
            reachable("train", one.files, one.training)
    job = Job(flags.name or default_name(run), tpu, flags.zone, source(), tuple(flags.job), flags.project, flags.spot)
    if flags.print_only:
        print(commands(job))
        return 0
    return launch(job, flags.keep)


def _precompile(flags: argparse.Namespace) -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, which would look for TPUs
    from codellm_jax.pods.topologies import with_memory

    topology, size, given = with_memory(flags.topology, flags.memory), flags.vocabulary_size, flags.overrides
    if size is not None and size < 1:
        raise ValueError(f"--vocabulary_size must be positive, found {size}.")
    _require_directory(flags.report)
    title = " ".join([*flags.gin_file, *(f"{name}={value}" for name, value in given)])
    # Reads nothing that only a run needs: not the run to start from, and no vocabulary if its size is given.
    unread = [("train.initial_checkpoint_path", "None"), *([("vocabulary.path", "python_8k")] if size else [])]
    from codellm_jax.configuration import build
    from codellm_jax.pods.precompile import precompile
    from codellm_jax.pods.programs import with_vocabulary_size

    def training(more: str) -> Any:
        flags.overrides = [*given, *overrides_of(words_of("--compare", more)), *unread]
        built = build(_configuration(flags), "train")
        return with_vocabulary_size(built, size) if size else built

    fits, page = precompile(
        training(""), topology, title=title, scoring=flags.scoring, decoding=flags.decode, search=not flags.no_search,
        other=(flags.compare, training(flags.compare)) if flags.compare else None,
        report=lambda line: print(line, flush=True))
    print("\n" + page, end="")
    if flags.report:
        Path(flags.report).expanduser().write_text(page)
    return 0 if fits else _fail("t5x precompile", f"the run does not fit {topology.name}.", 1)


def _fail(command: str, message: str, status: int) -> int:
    print(f"{command}: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
