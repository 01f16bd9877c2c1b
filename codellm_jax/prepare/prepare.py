"""`t5x prepare`: runs documents of CORPORA through the steps of STEPS and writes Parquet files that CORPORA reads
again.

The final content of OUTPUT:

  documents-00000-of-00007.parquet   the remaining ones; each with the file and row it was read from, and its hash;
                                     or documents-train.tfrecord-00000-of-00007 (or array_record), a TFDS dataset by
                                     features.json and dataset_info.json
  removed/                           the same for each removed document, with the step and the reason
  manifest.json                      inputs with sizes and times of change, steps with all options, counts, and the
                                     files' hashes
  README.md, card.html, steps.png    the data card

Until the end, all files are in OUTPUT.building, and the same command continues from the parts done there. Beam only
transports names of parts (`runtime.beam`); it is not used with one local worker.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from codellm_jax.mixture.tokens import quiet_stderr
from codellm_jax.prepare import examples, meeting, parts, reduction
from codellm_jax.prepare.card import write_card
from codellm_jax.prepare.job import Job, Part
from codellm_jax.prepare.preparation import Preparation
from codellm_jax.prepare.steps import Step, counts_tokens, described, hash_of, steps_of
from codellm_jax.results.files import write_whole
from codellm_jax.runtime import beam
from codellm_jax.runtime.process import alone_in

LEAST_PART, MOST_PARTS = 64 << 20, 1 << 14  # bytes; they determine `part_bytes` if it is None
LAYOUT = 3  # of the files in OUTPUT.building; increase it whenever they change


def prepare(
    preparation: Preparation, workers: int | None = None, runner: str = beam.LOCAL, options: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> None:
    """Prepares the documents, or continues an interrupted preparation.

    Args:
      preparation: the documents and the steps.
      workers: local processes; None for one per core if Beam is installed, else 1.
      runner: Beam's runner: DirectRunner, DataflowRunner, SparkRunner, FlinkRunner, PortableRunner.
      options: Beam's own options, as on its command lines.
      report: called with one line at a time.

    Raises:
      ValueError: a setting is wrong, Beam is needed but not installed, or OUTPUT holds something else.
      OSError: a file cannot be read or written.
    """
    work = _worker(workers, runner, options)
    output = preparation.output if "://" in preparation.output else os.path.abspath(
        os.path.expanduser(preparation.output))
    steps = steps_of(preparation.steps, list(preparation.inputs.corpora))
    if counts_tokens(steps) and preparation.vocabulary is None:
        raise ValueError("sample: budgets of tokens need the vocabulary that counts them: set VOCABULARY.")
    questions = _questions(preparation, steps)
    plan = _plan(preparation, steps, questions)
    hashes = {"steps_sha256": plan["steps_sha256"], "inputs_sha256": plan["inputs_sha256"]}
    if _is_done(epath.Path(output), plan):
        report(f"{output} already holds this preparation.")
        return
    _require_reach(runner, output, plan)
    folder = f"{output.rstrip('/')}.building"
    with alone_in(folder, "OUTPUT", "preparing documents"):
        of_parts = tuple(Part(source, None if files is None else tuple(map(tuple, files)), piece and tuple(piece))
                         for source, files, piece in plan["parts"])
        job = Job(preparation.inputs, tuple(steps), of_parts, folder, hashes, preparation.vocabulary,
                  preparation.format)
        _begin(job, plan, questions)
        _run(job, work, report)
        _finish(job, plan, epath.Path(output), report)


# ---- Planning ----------------------------------------------------------------------------------


def _plan(preparation: Preparation, steps: Sequence[Step], questions: Sequence[Any]) -> dict[str, Any]:
    """The plan, as JSON: everything that the output depends on."""
    inputs: list[Any] = []
    changed: dict[str, int] = {}
    of_parts: list[Any] = []
    of_corpora = {source: preparation.inputs.files(source) for source in preparation.inputs.corpora}
    part_bytes = preparation.part_bytes or max(
        LEAST_PART, sum(size for files in of_corpora.values() for _, size, _ in files or ()) // MOST_PARTS)
    for source, spec in preparation.inputs.corpora.items():
        files = of_corpora[source]
        inputs.append({"source": source, "spec": spec, "files": files and [[name, size] for name, size, _ in files]})
        if files is None:
            of_parts.append([source, None, None])
            continue
        changed |= {name: time for name, _, time in files}
        of_parts += _parts(preparation, source, files, part_bytes)
    text = json.dumps(questions, ensure_ascii=False)
    vocabulary = preparation.vocabulary.content_hash if preparation.vocabulary else None
    plan = {"inputs": inputs, "inputs_sha256": _hash(inputs), "changed": changed, "steps": described(steps),
            "steps_sha256": hash_of(steps, vocabulary), "vocabulary_sha256": vocabulary,
            "format": preparation.format, "vocabulary": preparation.vocabulary and preparation.vocabulary.path,
            "questions_sha256": hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest(),
            "tasks": Counter(task for task, _, _ in questions), "parts": of_parts, "layout": LAYOUT}
    return json.loads(json.dumps(plan))


def _parts(
    preparation: Preparation, source: str, files: Sequence[tuple[str, int, int]], part_bytes: int
) -> Iterator[list[Any]]:
    """The parts of a corpus: for each its name, its files, and the piece if a file is divided."""
    part: list[tuple[str, int, int]] = []
    held = 0
    for file in files:
        name, size, _ = file
        if part and held + size > part_bytes:
            yield [source, part, None]
            part, held = [], 0
        if size > part_bytes and (found := preparation.inputs.pieces(source, name, part_bytes)):
            yield from ([source, [file], piece] for piece in found)
            continue
        part.append(file)
        held += size
    if part:
        yield [source, part, None]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode(
        "utf-8", "backslashreplace")).hexdigest()


def _questions(preparation: Preparation, steps: Sequence[Step]) -> list[Any]:
    """The questions of all benchmarks, [task, id, texts] each, if a step searches for them."""
    if not any(step.name == "decontaminate" for step in steps):
        return []
    if preparation.benchmarks is None or not preparation.tasks:
        raise ValueError("the step 'decontaminate' needs benchmarks: name them in TASKS.")
    found = []
    for name in preparation.tasks:
        task = preparation.benchmarks.texts(name)
        found += [[f"{task.name}_sample" if task.is_sample else task.name, own, list(texts)]
                  for own, texts in task.parts.items()]
    return found


_KINDS = {"steps": "STEPS", "inputs": "files of CORPORA", "changed": "contents of files of CORPORA",
          "format": "FORMAT", "vocabulary_sha256": "VOCABULARY", "questions_sha256": "questions of TASKS",
          "parts": "files of CORPORA, or prepare.part_bytes,", "layout": "versions of this package"}


def _difference(before: Mapping[str, Any], plan: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The changed part of a plan, in words; None if nothing changed."""
    return next((_KINDS[key] for key in keys if before.get(key) != plan[key]), None)


def _is_done(output: epath.Path, plan: Mapping[str, Any]) -> bool:
    """Whether an output matches the plan. Raises ValueError if it belongs to another plan, or is something else."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"OUTPUT {output} is a file: name a folder.")
    manifest = output / "manifest.json"
    if manifest.exists():
        before = json.loads(manifest.read_text())
        if (differs := _difference(before, plan, (
                "steps", "inputs", "changed", "format", "vocabulary_sha256", "questions_sha256"))) is None:
            return True
        raise ValueError(f"OUTPUT {output} was prepared from different {differs}: choose another, or remove it.")
    if output.exists() and not epath.Path(f"{output}.building").exists() and any(output.iterdir()):
        raise ValueError(f"OUTPUT {output} exists and holds something else: choose another.")
    return False


def _require_reach(runner: str, output: str, plan: Mapping[str, Any]) -> None:
    """Raises ValueError if Dataflow's workers would need local files."""
    if not runner.lower().startswith("dataflow"):
        return
    names = [output, *(file for one in plan["inputs"] for file, _ in one["files"] or ())]
    names += [plan["vocabulary"]] if plan["vocabulary"] else []
    if local := [name for name in names if "://" not in name]:
        raise ValueError(f"Dataflow's workers do not see {local[0]} on this machine's disk: use gs://"
                         + ", or leave prepare.vocabulary = None." * (local == [plan["vocabulary"]]))


def _begin(job: Job, plan: Mapping[str, Any], questions: Sequence[Any]) -> None:
    """Writes the plan, or compares it with the plan of an earlier start."""
    path = epath.Path(job.folder) / "plan.json"
    if path.exists():
        if differs := _difference(json.loads(path.read_text()), plan, tuple(_KINDS)):
            raise ValueError(f"{job.folder} was started with different {differs}: remove it to start again, or choose "
                             "another OUTPUT.")
        return
    if "://" not in job.folder:
        left = sorted(name for name in os.listdir(job.folder) if name not in (".lock", "questions.json"))
        if left and not all(name.startswith(".") for name in left):
            raise ValueError(f"{job.folder} exists and holds something else, {left[0]}: remove it, or choose another "
                             "OUTPUT.")
    write_whole(epath.Path(job.folder) / "questions.json", json.dumps(questions, ensure_ascii=False))
    write_whole(path, json.dumps(plan, ensure_ascii=False))


# ---- Working -----------------------------------------------------------------------------------


def _worker(workers: int | None, runner: str, options: Sequence[str]) -> Callable[[Job, Sequence[str]], None]:
    """Returns the function that does a job's work: with Beam, or in this process."""
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, found {workers}.")
    if workers is None and runner == beam.LOCAL and not options and importlib.util.find_spec("apache_beam") is None:
        workers = 1
    if workers == 1 and runner == beam.LOCAL and not options:
        return _alone
    beam.require_beam("more than one worker, and other runners, need Apache Beam, which is not installed: pip install "
                      "'.[beam]'. --workers=1 does not need it.")
    if workers is not None:
        mode = ["--direct_running_mode=multi_processing"] * (workers > 1)
        options = [f"--direct_num_workers={workers}", *mode, *options]

    def by_beam(job: Job, todo: Sequence[str]) -> None:
        if runner == beam.LOCAL and len(todo) == 1:
            _alone(job, todo)  # starting workers would take longer
        else:
            with quiet_stderr() if runner == beam.LOCAL else contextlib.nullcontext():
                beam.run(functools.partial(do, job), todo, runner, options)

    return by_beam


def _alone(job: Job, todo: Sequence[str]) -> None:
    for text in todo:
        do(job, text)


def do(job: Job, text: str) -> None:
    """Does the work item named by a text: a part in a stage, a round after a stage for a bucket or a unit, or a row
    count.
    """
    what, *numbers = json.loads(text)
    if what == "part":
        parts.process(job, *numbers)
    elif what == "rows":
        parts.count_rows(job, *numbers)
    elif what == "bring":
        meeting.bring(job, *numbers)
    elif what == "compare":
        meeting.compare(job, *numbers)
    elif what == "star":
        reduction.star(job, *numbers)
    elif what == "joined":
        reduction.drop_joined(job, *numbers)
    else:
        reduction.reduce(job, *numbers)


def _run(job: Job, work: Callable[[Job, Sequence[str]], None], report: Callable[[str], None]) -> None:
    """Runs all stages that are not done."""
    stages = job.stages
    for stage, of_stage in enumerate(stages):
        (epath.Path(job.folder) / f"stage{stage}").mkdir(parents=True, exist_ok=True)
        todo = [part for part in range(len(job.parts)) if not job.path(stage, "facts", part, ".json").exists()]
        names = [job.steps[number].name for number in (of_stage.before, *of_stage.rules) if number is not None]
        told = f"stage {stage + 1} of {len(stages)} ({', '.join(names) or 'reading'}): "
        if not todo:
            report(f"{told}done before.")
            if not stage:
                _tell_lost(job, report)
            continue
        if stage:
            for of_round in reduction.rounds(job, stage - 1):
                work(job, of_round)
            reduction.finish(job, stage - 1, functools.partial(work, job))
        else:
            work(job, [json.dumps(["rows", part]) for part, one in enumerate(job.parts) if one.piece])
            parts.sum_rows(job)
        work(job, [json.dumps(["part", stage, part]) for part in todo])
        left = sum((job.facts(stage, part) or {})["documents"] for part in range(len(job.parts)))
        report(f"{told}{left:,} documents left, in {len(job.parts):,} part{'s' * (len(job.parts) > 1)}.")
        if stage:
            _forget(job, stage - 1)
        else:
            _tell_lost(job, report)


def _tell_lost(job: Job, report: Callable[[str], None]) -> None:
    """Reports the unreadable records of each corpus. Raises ValueError if no record of a corpus could be read."""
    read: Counter[str] = Counter()
    lost: dict[str, Counter[str]] = {}
    first: dict[str, str] = {}
    for number, part in enumerate(job.parts):
        facts = job.facts(0, number) or {}
        read[part.source] += facts["read"]["documents"]
        lost.setdefault(part.source, Counter()).update(facts["lost"])
        for place in facts["first_lost"].values():
            first.setdefault(part.source, place)
    for source, reasons in lost.items():
        told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        if not read[source]:
            found = f"no document is left of its records: {told}. The first is in {first[source]}" if reasons else \
                "it has no records"
            raise ValueError(f"{source}: {found}. Correct the corpus, remove {job.folder} and start again.")
        if reasons:
            hold = "record holds" if reasons.total() == 1 else "records hold"
            report(f"{source}: {reasons.total():,} {hold} no document: {told}.")


def _forget(job: Job, stage: int) -> None:
    """Removes the documents of a stage and the data derived from them, once the next stage is done."""
    for kind in ("documents", "keys", "signed", "shingles", "met", "brought", "edges", "star", "found"):
        for path in job.files(stage, kind):
            path.unlink()


# ---- The end -----------------------------------------------------------------------------------


def _finish(job: Job, plan: Mapping[str, Any], output: epath.Path, report: Callable[[str], None]) -> None:
    """Moves everything into place, the manifest last."""
    facts = [[job.facts(stage, part) or {} for part in range(len(job.parts))] for stage in range(len(job.stages))]
    last = len(job.stages) - 1
    (output / "removed").mkdir(parents=True, exist_ok=True)
    written = []
    filled = [part for part, of_part in enumerate(facts[last]) if of_part["documents"]]
    for number, part in enumerate(filled):
        name = f"documents-{part:05d}-of-{len(job.parts):05d}.parquet" if job.format == "parquet" else \
            examples.shard(job.format, number, len(filled))
        _move(job.documents_path(last, part), output / name)
        of_part, shape = facts[last][part], facts[last][part]["shape"]
        written.append({"file": name, "source": job.parts[part].source, "documents": of_part["documents"],
                        "bytes": shape["bytes"], "tokens": shape["tokens"], "sha256": of_part["sha256"]})
    for stage, of_stage in enumerate(facts):
        for part, of_part in enumerate(of_stage):
            if of_part["removed"]:
                _move(job.path(stage, "removed", part, ".parquet"),
                      output / "removed" / f"stage{stage}-{part:05d}.parquet")
    if job.format != "parquet":
        size = sum(facts[last][part]["bytes"] for part in filled)
        for name, text in examples.descriptions(
                job.format, [one["documents"] for one in written], size, job.vocabulary is not None):
            write_whole(output / name, text)
    manifest = {key: plan[key] for key in ("inputs", "inputs_sha256", "changed", "steps", "steps_sha256", "format",
                                           "vocabulary", "vocabulary_sha256", "tasks", "questions_sha256")}
    sources = list(dict.fromkeys(part.source for part in job.parts))
    counted = write_card(output, manifest, job, facts, sources)
    write_whole(output / "manifest.json", json.dumps(
        manifest | {"counts": counted, "outputs": written}, indent=2, ensure_ascii=False) + "\n")
    if "://" not in job.folder:
        shutil.rmtree(job.folder)
    else:
        epath.Path(job.folder).rmtree()
    documents, size = sum(one["documents"] for one in written), sum(one["bytes"] for one in written)
    report(f"{documents:,} documents, {size / 1e6:,.1f} MB of text in {output}; see README.md there.")


def _move(path: epath.Path, to: epath.Path) -> None:
    """Moves a file, unless that is done."""
    if path.exists():
        path.replace(to)
