"""The flags of the `t5x` command and of its sub-commands."""

import argparse
import difflib
import shlex
import textwrap
from collections.abc import Iterable, Sequence

from codellm_jax import t5x_names

WIDTH = 100  # of descriptions
GIN_FLAGS = """gin flags:
  --gin_file=FILE          settings; repeatable, later ones win. Shipped files are found from any directory
  --gin.NAME=VALUE         one setting; a bare word is a string. --gin.CODE_RATE=0.5, --gin.MODEL_DIR=runs/first
  --gin_bindings=BINDING   the same in gin's syntax, as in T5X. --gin_bindings='CODE_RATE = 0.5'
  --gin_search_paths=DIRS  comma-separated, more directories to search for gin files"""

EXAMPLES = {
    "train": ("t5x train --gin_file=gin/mixed_pretrain.gin --gin.CODE_RATE=0.5 --gin.MODEL_DIR=runs/half",
              "t5x train --gin_file=gin/tune_mixed.gin --gin.INITIAL_CHECKPOINT_PATH=runs/half --dry_run"),
    "eval": ("t5x eval --gin_file=gin/eval.gin --gin.CHECKPOINT_PATH=runs/half",
             "t5x eval --gin_file=gin/eval.gin --gin.CHECKPOINT_PATH=runs/half \"--gin.TASKS=['logic', 'mbpp']\""),
    "study": ("t5x study --gin_file=gin/study.gin --dry_run",
              "t5x study --gin_file=gin/study.gin --gin_file=mine.gin --devices_per_run=1"),
    "infer": ("t5x infer --gin_file=gin/infer.gin --gin.CHECKPOINT_PATH=runs/half",
              "t5x infer --gin_file=gin/infer.gin --gin.CHECKPOINT_PATH=runs/half --prompts=prompts.txt "
              "--output=answers.jsonl"),
    "compare": ("t5x compare runs/text runs/half",
                "t5x compare studies/first/runs/NC-uniform.seed0 studies/first/runs/NN.seed0"),
    "contamination": ("t5x contamination --gin_file=gin/mixed_pretrain.gin",
                      "t5x contamination --gin_file=gin/mixed_pretrain.gin --output=found.json "
                      "\"--gin.TASKS=['mbpp']\""),
    "report": ("t5x report studies/first", "t5x report studies/first --serve"),
    "plot": ("t5x plot runs/half", "t5x plot runs/text runs/half --output=losses.svg --against=tokens"),
    "laws": ("t5x laws studies/first", "t5x laws studies/first --objective=text:0.5,code:0.5 --tokens=2.5B"),
    "list": ("t5x list models", "t5x list corpora"),
    "settings": ("t5x settings CODE_RATE", "t5x settings dropout"),
    "show": ("t5x show runs/half", "t5x show gs://BUCKET/studies/first"),
    "explain": ("t5x explain BATCH_SIZE --gin_file=gin/mixed_pretrain.gin",
                "t5x explain --gin_file=gin/mixed_pretrain.gin"),
    "vocabulary": ("t5x vocabulary --gin_file=gin/mixed_pretrain.gin --output=my.model",
                   "t5x vocabulary --gin_file=gin/mixed_pretrain.gin --gin_file=mine.gin --size=32768 "
                   "--output=my.model"),
    "cache": ("t5x cache --gin_file=gin/mixed_pretrain.gin",
              "t5x cache --gin_file=gin/mixed_pretrain.gin -- --direct_num_workers=8"),
    "fetch": ("t5x fetch", "t5x fetch mbpp logic --data_dir=data"),
    "prepare": ("t5x prepare --gin_file=gin/prepare.gin --gin_file=mine.gin",
                "t5x prepare --gin_file=gin/prepare.gin --gin_file=mine.gin --workers=8"),
    "import": ("t5x import hf://Qwen/Qwen3-0.6B --output=runs/qwen3",
               "t5x import models/llama --output=runs/llama --check"),
    "adopt": ("t5x adopt runs/t5x --output=runs/adopted", "t5x adopt runs/half --output=runs/given --to=t5x"),
    "export": ("t5x export runs/half --output=exported", "t5x export runs/half@200 --output=exported --dtype=bfloat16"),
    "launch": ("t5x launch --tpu=v5e-16 --zone=us-west4-a -- train --gin_file=gin/mixed_pretrain.gin "
               "--gin.MODEL_DIR=gs://BUCKET/half",
               "t5x launch --tpu=v4-8 --zone=us-central2-b --print_only -- study --gin_file=gin/study.gin "
               "--gin.STUDY_DIR=gs://BUCKET/first"),
    "precompile": ("t5x precompile --gin_file=gin/mixed_pretrain.gin --topology=v5e-16",
                   "t5x precompile --gin_file=gin/mixed_pretrain.gin --gin_file=gin/models/2_6b.gin "
                   "--topology=v4-128"),
}


def parser() -> argparse.ArgumentParser:
    """The parser of `t5x` and its sub-commands, without --gin.NAME=VALUE."""
    whole = argparse.ArgumentParser(
        prog="t5x",
        description="Measures at which training stage code data helps a language model: trains, evaluates "
        "and compares the runs that gin files describe.",
        epilog=GIN_FLAGS, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    subparsers = whole.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str, description: str) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name, help=text, description=description, epilog=GIN_FLAGS, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("--gin_file", action="append", default=[],
                             help="settings; repeatable, later ones win (see below)")
        command.add_argument("--gin_search_paths", default="", help="folders of gin files (see below)")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return command

    def add_processes(command: argparse.ArgumentParser) -> None:
        group = command.add_argument_group("several processes", "JAX finds them on Cloud TPU, Slurm and Open MPI; "
                                                                "else:")
        group.add_argument("--coordinator_address", metavar="HOST:PORT", help="address of the first process")
        group.add_argument("--process_count", type=int, metavar="N", help="number of processes")
        group.add_argument("--process_index", type=int, metavar="I", help="index of this process, from 0")
        group.add_argument("--heartbeat_seconds", type=int, metavar="SECONDS",
                           help="seconds without a heartbeat after which a process counts as lost, which ends the run; "
                                "default: 30")
        group.add_argument("--local_processes", type=int, metavar="N",
                           help="start N processes on this machine's CPUs, to try multi-process training")

    train = add("train", "train a decoder on a text/code mixture",
                "Trains to TRAIN_STEPS, from MODEL_DIR's newest checkpoint if there is one. SIGTERM saves a "
                "checkpoint and exits.")
    train.add_argument("--dry_run", action="store_true", help="print what would be trained, and train nothing")
    train.add_argument("--profile_steps", metavar="FIRST:LAST",
                       help="write a trace of these steps for TensorBoard and Perfetto, such as 10:15")
    train.add_argument("--runner", choices=("own", "t5x"), default="own",
                       help="the trainer: this package's own, or upstream T5X's if that is installed (default: "
                       "%(default)s)")
    add_processes(train)
    add_processes(add("eval", "evaluate a checkpoint on benchmarks",
                      "Evaluates CHECKPOINT_PATH's newest checkpoint on TASKS. The same command continues after an "
                      "interruption."))
    study = add("study", "train and evaluate every arm of a study",
                "Trains and evaluates every arm of ARMS with each of SEEDS, each after the arm that it starts "
                "from. The same command continues after an interruption.")
    study.add_argument("--dry_run", action="store_true", help="print the plan, its cost and its time; train nothing")
    study.add_argument("--status", action="store_true",
                       help="print which worker trains what, what failed and why, and the time left")
    study.add_argument("--print_commands", default="", metavar="FORM",
                       choices=("shell", "slurm", "kubernetes"),
                       help="print the plan as commands, or with =slurm or =kubernetes as a job of workers; run "
                       "none")
    study.add_argument("--worker", action="store_true",
                       help="work as one of several, on any machines that see STUDY_DIR; do not retry failed runs")
    study.add_argument("--devices_per_run", type=int, metavar="N",
                       help="start a worker for each N devices of this machine")
    study.add_argument("--lease_seconds", type=float, default=120.0, metavar="S",
                       help="seconds without a heartbeat after which another worker takes a run "
                       "(default: %(default)g)")
    study.add_argument("--arm", action="append", default=[], metavar="ARM",
                       help="only this arm and those that it starts from; NC means all of NC-...; repeatable")
    study.add_argument("--seed", action="append", default=[], type=int, help="only this seed; repeatable")
    study.add_argument("--redo", action="store_true",
                       help="train runs again whose configuration changed, and keep the old ones in replaced/")
    infer = add("infer", "write text with a checkpoint",
                "Continues prompts with CHECKPOINT_PATH's newest checkpoint. Without --prompts, prompts are read "
                "from the terminal.")
    infer.add_argument("--prompts", metavar="FILE",
                       help="a file of prompts, one a line, or JSON lines if its name ends in .jsonl")
    infer.add_argument("--output", metavar="FILE", help="write the answers there, as JSON lines")
    infer.add_argument("--instruction", action="store_true",
                       help="format each prompt as in tuning: by the chat template, or as an instruction")
    compare = subparsers.add_parser("compare", help="compare two runs' results", allow_abbrev=False,
                                    description="Paired tests of two evaluated runs on the same questions.")
    compare.add_argument("first", metavar="RUN_A")
    compare.add_argument("second", metavar="RUN_B")
    compare.add_argument("--debug", action="store_true", help="show the traceback of an error")
    contamination = add("contamination", "search a mixture's training text for benchmarks' questions",
                        "Counts the questions of TASKS that share an n-gram of words with the training rows of an "
                        "arm's sources. Reads gin/contamination.gin before the arm's files.")
    contamination.add_argument("--output", metavar="FILE",
                               help="write the result to this file, as JSON with the ids of questions")
    report = subparsers.add_parser("report", help="tables, plots and conclusions of a study", allow_abbrev=False,
                                   description="Reads a study, or a folder of evaluated runs; writes DIR/report.")
    report.add_argument("directory", metavar="DIR", help="a study, a run or a folder of runs, local or gs://")
    report.add_argument("--serve", action="store_true",
                        help="show a page on this machine that follows a study while it runs; write nothing")
    report.add_argument("--host", default="127.0.0.1", help="address to serve at (default: %(default)s, this machine "
                        "alone); at another address everybody who can reach it can read the page")
    report.add_argument("--port", type=int, help="default: 8000, or a free one if that is in use; 0: a free one")
    report.add_argument("--debug", action="store_true", help="show the traceback of an error")
    plot = subparsers.add_parser(
        "plot", help="a figure of the losses of runs", allow_abbrev=False,
        description="Draws training and held-out losses of runs; each branch continues its trunk.")
    plot.add_argument("runs", metavar="RUN", nargs="+", help="a run directory")
    plot.add_argument("--output", metavar="FILE", help="ends in .png, .svg or .pdf (default: RUN/losses.png of one "
                      "run, else losses.png)")
    plot.add_argument("--against", choices=("steps", "tokens"), default="steps")
    plot.add_argument("--debug", action="store_true", help="show the traceback of an error")
    laws = subparsers.add_parser(
        "laws", help="fit laws to a sweep's losses, and find the best share", allow_abbrev=False,
        description="Fits laws of held-out losses to a sweep of shares. Prints the best share with its interval, or "
                    "that the runs do not determine it, and which further runs would. Writes DIR/report/laws.json.")
    laws.add_argument("directory", metavar="DIR", help="a study's directory, or one with Olmix's ratios.csv and "
                                                       "metrics.csv")
    laws.add_argument("--objective", metavar="LOSS:WEIGHT,...",
                      help="losses to minimise with their weights, such as text:0.5,code:0.5, or a benchmark's "
                      "ekar/bits_per_byte:1; measures to maximise get a negative weight (default: equal weights of "
                      "the pools)")
    laws.add_argument("--size", metavar="PARAMETERS", help="size of the target model, such as 125M (default: the "
                                                           "largest "
                      "of the runs)")
    laws.add_argument("--tokens", help="its training tokens, such as 2.5B (default: those of the runs)")
    laws.add_argument("--predict", metavar="FILE", help="shares in the columns of ratios.csv; writes their predicted "
                      "losses to DIR/report/predictions.csv")
    laws.add_argument("--debug", action="store_true", help="show the traceback of an error")
    show = subparsers.add_parser(
        "show", help="the current state of a run, a study or a folder of runs", allow_abbrev=False,
        description="Prints the state, last losses, speed, trained tokens, checkpoints and next step of a run; "
                    "the arms of a study, and which of them are running or failed; a folder of runs as a table.")
    show.add_argument("path", metavar="DIR", help="a run, a study or a folder of runs, local or gs://")
    show.add_argument("--debug", action="store_true", help="show the traceback of an error")
    list_ = subparsers.add_parser(
        "list", help="shipped models, studies, kinds of corpora, benchmarks and more", allow_abbrev=False,
        description="Lists everything of a kind: models, studies, arms, corpora, transforms, benchmarks, templates, "
                    "schedules and others. Without a kind, lists the kinds.")
    list_.add_argument("kind", metavar="KIND", nargs="?", help="such as models or corpora")
    list_.add_argument("--debug", action="store_true", help="show the traceback of an error")
    settings = subparsers.add_parser(
        "settings", help="every setting: meaning, type, default", allow_abbrev=False,
        description="Prints every setting of gin files and flags, one per line. With a word, prints the settings "
                    "that have this name or mention it, with type, default, meaning, and the shipped files that set "
                    "it.")
    settings.add_argument("word", metavar="WORD", nargs="?", help="a name such as CODE_RATE, or a word such as dropout")
    settings.add_argument("--debug", action="store_true", help="show the traceback of an error")
    explain = add("explain", "print which file or flag sets a value",
                  "Prints what sets NAME and what that overrides; without a name, everything that the files and flags "
                  "set.")
    explain.add_argument("name", metavar="NAME", nargs="?", help="a setting such as BATCH_SIZE or model.layers")
    vocabulary = add("vocabulary", "train a SentencePiece vocabulary on a mixture",
                     "Trains a byte-fallback BPE vocabulary on the mixture's training documents.")
    vocabulary.add_argument("--output", required=True, help="the file to write, such as my.model")
    vocabulary.add_argument("--size", type=int, default=8192, help="pieces (default: %(default)s)")
    cache = add("cache", "tokenize a run's data with many processes, before the run",
                "Writes the rows that a run with these settings would cache itself, with Apache Beam. The same "
                "command continues after an interruption. Options after -- go to Beam: t5x cache ... -- "
                "--direct_num_workers=8")
    cache.add_argument("--runner", default="DirectRunner", help="Beam's runner: DirectRunner on this machine, "
                                                                "DataflowRunner, "
                       "SparkRunner, FlinkRunner or another (default: %(default)s)")
    fetch = subparsers.add_parser(
        "fetch", help="download official files of benchmarks and instruction sets", allow_abbrev=False,
        description="Downloads the publishers' files into a folder for DATA_DIR, and checks them. The same command "
                    "resumes an interrupted download. Without names, lists them all.")
    fetch.add_argument("names", metavar="NAME", nargs="*", help="such as mbpp, logic or pclue")
    fetch.add_argument("--data_dir", "--gin.DATA_DIR", metavar="DIR", help="the folder, created if needed")
    fetch.add_argument("--debug", action="store_true", help="show the traceback of an error")
    prepare = add("prepare", "clean documents, remove duplicates and benchmark questions, and sample",
                  "Processes the documents of CORPORA by STEPS into Parquet files in OUTPUT, with a data card. The "
                  "same command continues after an interruption. Options after -- go to Beam.")
    prepare.add_argument("--workers", type=int, metavar="N", help="processes on this machine (default: its cores if "
                         "Apache Beam is installed, else 1)")
    prepare.add_argument("--runner", default="DirectRunner", help="Beam's runner, as in `t5x cache` (default: "
                                                                  "%(default)s)")
    import_ = subparsers.add_parser(
        "import", help="turn published weights into a run", allow_abbrev=False,
        description="Reads a published model, tensor by tensor, into a run directory, as a run at step 0.")
    import_.add_argument("source", metavar="SOURCE",
                         help="a folder with config.json and safetensors, local or gs://, or hf://ORG/NAME[@REVISION]")
    import_.add_argument("--output", required=True, metavar="RUN", help="the run directory to make")
    import_.add_argument("--vocabulary", metavar="PATH", help="the tokenizer, if SOURCE has none")
    import_.add_argument("--check", action="store_true",
                         help="compare logits with transformers, which holds the whole model in memory twice; status "
                         "1 if they differ by more than 0.001")
    import_.add_argument("--debug", action="store_true", help="show the traceback of an error")
    export = subparsers.add_parser(
        "export", help="write a checkpoint for Hugging Face's libraries", allow_abbrev=False,
        description="Writes a checkpoint as a folder that transformers, vLLM and lm-evaluation-harness open: "
                    "configuration, tensors, tokenizer and a model card.")
    export.add_argument("run", metavar="RUN[@STEP]", help="a run directory; without a step its newest checkpoint")
    export.add_argument("--output", required=True, metavar="DIR", help="a new folder, local or gs://")
    export.add_argument("--dtype", help="of the tensors: float32, bfloat16 or float16 (default: the original one of an "
                        "imported model that was not trained, else float32)")
    export.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="of a file (default: %(default)s)")
    export.add_argument("--vocabulary", metavar="FILE", help="the run's vocabulary, if it was moved")
    export.add_argument("--debug", action="store_true", help="show the traceback of an error")
    adopt = add("adopt", "convert a run of upstream T5X to this package, or back",
                "Makes a run directory from the newest checkpoint of a T5X run, or with --to=t5x the reverse. "
                "Without --gin_file, the settings come from T5X's config.gin, if that used a file of gin/t5x/.")
    adopt.add_argument("source", metavar="DIR", help="T5X's MODEL_DIR or one of its checkpoints; with --to=t5x a run "
                       "directory or RUN@STEP")
    adopt.add_argument("--output", required=True, metavar="DIR", help="the directory to make")
    adopt.add_argument("--to", choices=("run", "t5x"), default="run", help="what to make (default: %(default)s)")
    launch = subparsers.add_parser(
        "launch", help="run a command on Cloud TPU", allow_abbrev=False,
        usage="t5x launch --tpu=NAME --zone=ZONE [flags] -- COMMAND ...",
        description="Requests a queued resource, installs this commit on it, runs `t5x COMMAND`, prints its log, "
                    "continues after a preemption, and deletes the resource at the end or at Ctrl-C.")
    launch.add_argument("--tpu", required=True, help="such as v4-128, v5e-256, v5p-128, v6e-64, 2xv5e-256")
    launch.add_argument("--zone", required=True, help="such as us-central2-b")
    launch.add_argument("--project", help="Google Cloud project (default: gcloud's own setting)")
    launch.add_argument("--name", help="name of the queued resource (default: from the run directory)")
    launch.add_argument("--spot", action="store_true", help="cheaper, and may be preempted")
    launch.add_argument("--keep", action="store_true", help="do not delete the resource at the end")
    launch.add_argument("--print_only", action="store_true", help="print the commands, and run none")
    launch.add_argument("--debug", action="store_true", help="show the traceback of an error")
    precompile = add("precompile", "compile a run for TPUs that you do not have",
                     "Compiles the train step of a run for a TPU topology, without TPUs and without data, and prints "
                     "memory, traffic, a bound on speed and an estimate. Status 1 if it does not fit.")
    precompile.add_argument("--topology", required=True,
                            help="such as v4-128, v5e-256, 2xv5e-256 (two slices), or gpu:2 (two cards)")
    precompile.add_argument("--memory", help="of each card of --topology=gpu:2, such as 80GiB")
    precompile.add_argument("--vocabulary_size", type=int, help="stands in for the run's vocabulary file")
    precompile.add_argument("--scoring", action="store_true", help="compile the scoring of an evaluation too")
    precompile.add_argument("--decode", action="store_true", help="compile decoding too")
    precompile.add_argument("--no_search", action="store_true",
                            help="search neither for the largest batch nor for a configuration that fits")
    precompile.add_argument("--compare", metavar="FLAGS",
                            help="compile the run with these settings too, and print both in one table, such as "
                                 "--compare='--gin.model.remat=dots'")
    precompile.add_argument("--report", help="also write the page into this file, as Markdown")
    for name, command in subparsers.choices.items():
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.description = textwrap.fill(command.description or "", WIDTH)
        examples = "\n".join(f"  {example}" for example in EXAMPLES[name])
        command.epilog = "\n\n".join(filter(None, [command.epilog, f"examples:\n{examples}"]))
    return whole


def refusal(arguments: Sequence[str], commands: Iterable[str]) -> str | None:
    """One line if there is no such sub-command; None if there is one, or none is given."""
    if said := t5x_names.of_command(arguments):
        return said
    if not arguments or arguments[0].startswith("-") or arguments[0] in commands:
        return None
    near = difflib.get_close_matches(arguments[0], commands, n=1, cutoff=0.0)
    return f"there is no sub-command {arguments[0]!r}; nearest: {near[0]}. See t5x --help."


def without(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments without a flag and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and not argument.startswith(f"{flag}=") and argument != flag:
            kept.append(argument)
        skip = argument == flag
    return kept


def words_of(flag: str, text: str) -> list[str]:
    """The words of a flag's value, split as in a shell. Raises ValueError for an unclosed quotation."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{flag}={text} cannot be read ({error}): close the quotation.") from None


def overrides_of(rest: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of each --gin.NAME=VALUE (or --gin.NAME VALUE) and --gin_bindings='NAME = VALUE'. Raises
    ValueError for any other flag.
    """
    overrides, position = [], 0
    while position < len(rest):
        flag = rest[position]
        if flag.split("=")[0] == "--gin_bindings":
            _, equals, binding = flag.partition("=")
            if not equals:
                position += 1
                binding = rest[position] if position < len(rest) else ""
            name, equals, value = (part.strip() for part in binding.partition("="))
            if not name or not value:
                raise ValueError(f"--gin_bindings must be 'NAME = VALUE', found {binding!r}.")
            overrides.append((name, value))
            position += 1
            continue
        if not flag.startswith("--gin."):
            known = ["--gin.NAME", *_flags_of(parser())]
            near = difflib.get_close_matches(flag.split("=")[0], known, n=1, cutoff=0.4)
            raise ValueError(f"unknown argument {flag}" + (
                t5x_names.of_flag(flag.split("=")[0]) or (f"; nearest: {near[0]}." if near else ".")))
        name, equals, value = flag.removeprefix("--gin.").partition("=")
        if not equals:
            position += 1
            if position == len(rest):
                raise ValueError(f"{flag} needs a value: --gin.{name}=VALUE.")
            value = rest[position]
        overrides.append((name, value))
        position += 1
    return overrides


def _flags_of(command: argparse.ArgumentParser) -> list[str]:
    """Every flag of a command and of its sub-commands."""
    found: dict[str, None] = {}
    for action in command._actions:
        found |= dict.fromkeys(option for option in action.option_strings if option.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                found |= dict.fromkeys(_flags_of(sub))
    return list(found)
