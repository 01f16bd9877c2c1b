"""Processes one part in one stage: reads documents, applies rules, and writes the remaining documents."""

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from codellm_jax.mixture.ngrams import Lengths, NGrams, Question, index, words
from codellm_jax.prepare import ranged
from codellm_jax.prepare.examples import Records
from codellm_jax.prepare.job import DROPPED, PART_BITS, REMOVED, Count, Job, Table, read_rows
from codellm_jax.prepare.keys import Keys, bin_of
from codellm_jax.prepare.shapes import Shape
from codellm_jax.prepare.steps import Step, apply

SHOWN = 100  # characters of an n-gram


def process(job: Job, stage: int, part: int) -> None:
    """Does one part in one stage, unless it is done.

    Raises:
      ValueError: a file has changed since the preparation was planned, or is not of its kind.
      OSError: a file cannot be read or written.
    """
    if job.facts(stage, part) is not None:
        return
    documents = job.documents(stage, part)
    removed = Table(job.path(stage, "removed", part, ".parquet"), REMOVED, job.hashes)
    after = None if (number := job.stages[stage].after) is None else job.steps[number]
    keys = Keys(job, stage, part, after if after and after.looks_at(job.parts[part].source) else None)
    try:
        facts = _processed(job, stage, part, documents, removed, keys)
        keys.close()
    except BaseException:
        for written in (documents, removed, keys):
            written.discard()
        raise
    removed.close()
    documents.close()
    if facts["shape"]:
        facts["sha256"] = file_hash(job.documents_path(stage, part))
    ranged.write_bytes(job.path(stage, "facts", part, ".json"),
                       json.dumps(facts, ensure_ascii=False).encode("utf-8", "backslashreplace"))


def _processed(
    job: Job, stage: int, part: int, documents: Table | Records, removed: Table, keys: Keys
) -> dict[str, Any]:
    """Writes the remaining and the removed documents; returns the facts."""
    of_stage, source = job.stages[stage], job.parts[part].source
    rules = [(number, job.steps[number]) for number in of_stage.rules if job.steps[number].looks_at(source)]
    before = None if of_stage.before is None else job.steps[of_stage.before]
    counts = {number: Count() for number in (of_stage.before, *of_stage.rules) if number is not None}
    read = {"documents": 0, "bytes": 0, "tokens": 0}
    shape = Shape() if of_stage.after is None else None
    lost: dict[str, int] = {}
    first: dict[str, str] = {}
    overlaps: dict[str, dict[str, str]] = {}

    def remove(document: dict[str, Any], number: int, reason: str, size: int, copy: np.void | None = None) -> None:
        kept = {} if copy is None else _copy(job, copy)
        row = {key: document[key] for key in ("source", "file", "row", "sha256")}
        told = {"number": number + 1, "step": job.steps[number].name, "reason": reason, "records": 1,
                "bytes": size, "tokens": document["tokens"]}
        removed.add({**row, **told, **kept}, len(reason))
        counts[number].remove(reason, size, document["tokens"], {**row, "text": document["text"], **kept})

    found = _read(job, part, lost, first, removed) if before is None else _left(job, stage, part)
    gone = _Gone(job, stage, part, before)
    for place, document in enumerate(found):
        size = len(document["text"].encode())
        read = {"documents": read["documents"] + 1, "bytes": read["bytes"] + size,
                "tokens": read["tokens"] + (document["tokens"] or 0)}
        if before is not None and of_stage.before is not None:
            count = counts[of_stage.before]
            count.see(size, document["tokens"])
            reason, copy, text = gone.of(place, document)
            if reason is not None:
                remove(document, of_stage.before, reason, size, copy)
                continue
            size = _changed(job, document, before, text, size, count)
        for number, step in rules:
            count = counts[number]
            count.see(size, document["tokens"])
            if step.name == "decontaminate":
                text, reason = document["text"], _overlap(job, step, document["text"], overlaps)
            else:
                text, reason = apply(step, document)
            if reason is not None:
                remove(document, number, reason, size)
                break
            size = _changed(job, document, step, text, size, count)
        else:
            keys.add(documents.count, document, size)
            documents.add(document, size)
            if shape:
                shape.add(document, size)
    return {"read": read, "documents": documents.count, "bytes": documents.bytes, "removed": removed.count,
            "lost": dict(sorted(lost.items())), "first_lost": first, "overlaps": overlaps,
            "shape": shape and shape.facts(), "steps": {str(number): count.facts() for number, count in counts.items()}}


def file_hash(path: epath.Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def _changed(job: Job, document: dict[str, Any], step: Step, text: str, size: int, count: Count) -> int:
    """Replaces a document's text by a step's output; returns the document's new size in bytes."""
    if text == document["text"]:
        return size
    document["text"] = text
    document["changed_by"].append(step.name)
    now, tokens = len(text.encode()), job.tokens(text)
    count.change(size - now, (document["tokens"] or 0) - (tokens or 0))
    document["tokens"] = tokens
    return now


def _copy(job: Job, dropped: np.void) -> dict[str, Any]:
    """The document of which a removed one is a copy: its corpus, the beginning of its hash, and the similarity."""
    return {"copy_source": job.parts[int(dropped["copy"]) >> PART_BITS].source,
            "copy_sha256": f"{int(dropped['rank']):016x}", "similarity": round(float(dropped["similarity"]), 4)}


# ---- Reading a part ------------------------------------------------------------------------------


def _read(
    job: Job, part: int, lost: dict[str, int], first: dict[str, str], removed: Table
) -> Iterator[dict[str, Any]]:
    """The documents in a part's files. Counts and records those that hold none, with the place of the first for each
    reason.
    """
    source, files, piece = job.parts[part]
    for file in files or ():
        if job.inputs.state(file[0]) != file:
            raise ValueError(f"{source}: {file[0]} has changed since this preparation began. Remove {job.folder} "
                             "and start again.")
    names = None if files is None else [file for file, _, _ in files]
    for each in job.inputs.documents(source, names, piece, _rows_before(job, part)):
        row = {"source": source, "file": each.file, "row": each.row}
        if each.text is None:
            lost[each.reason] = lost.get(each.reason, 0) + each.records
            first.setdefault(each.reason, each.place)
            told = {"number": 0, "step": "reading", "reason": each.reason, "records": each.records, "bytes": 0}
            removed.add({**row, **told}, len(each.reason))
            continue
        content = each.text.encode()
        yield {**row, "text": each.text, "sha256": hashlib.sha256(content).hexdigest(), "license": each.licence,
               "language": each.language, "bytes_read": len(content), "tokens": job.tokens(each.text),
               "changed_by": []}


def count_rows(job: Job, part: int) -> None:
    """Writes the number of rows of a part that is a piece of a file, unless that is done."""
    path = job.path(0, "rows", part, ".json")
    source, files, piece = job.parts[part]
    if files and piece and not path.exists():
        ranged.write_bytes(path, json.dumps(job.inputs.rows(source, files[0][0], piece)).encode())


def sum_rows(job: Job) -> None:
    """Once all pieces are counted, writes for each part the number of rows of its file before it."""
    before, of_file = 0, None
    found = []
    for number, part in enumerate(job.parts):
        before = before if (part.source, part.files) == of_file else 0
        of_file = part.source, part.files
        found.append(before)
        before += json.loads(job.path(0, "rows", number, ".json").read_text()) if part.piece else 0
    ranged.write_bytes(epath.Path(job.folder) / "stage0" / "rows_before.json", json.dumps(found).encode())


def _rows_before(job: Job, part: int) -> int:
    """The number of rows of its file before a part; 0 if the part is not a piece of a file."""
    if not job.parts[part].piece:
        return 0
    return json.loads((epath.Path(job.folder) / "stage0" / "rows_before.json").read_text())[part]


def _left(job: Job, stage: int, part: int) -> Iterator[dict[str, Any]]:
    """The documents that remain after the previous stage."""
    return read_rows(job.path(stage - 1, "documents", part, ".parquet"))


class _Gone:
    """The documents and lines of a part that a step which needs all documents removes."""

    def __init__(self, job: Job, stage: int, part: int, step: Step | None) -> None:
        self._step, self._at = step, 0
        self._dropped = np.zeros(0, DROPPED)
        if step is None:
            return
        if step.name == "sample":
            budgets = json.loads(job.path(stage - 1, "found", 0, ".json").read_text())
            self._most = budgets.get(job.parts[part].source)
            return
        folder = epath.Path(job.folder) / f"stage{stage - 1}"
        files = sorted(path for path in folder.iterdir() if path.name.startswith("found-"))
        found = ranged.read(files, DROPPED, len(job.parts), part, part + 1)
        found["document"] &= np.uint64((1 << PART_BITS) - 1)
        self._dropped = found[np.lexsort((found["place"], found["document"]))]

    def of(self, place: int, document: dict[str, Any]) -> tuple[str | None, np.void | None, str]:
        """For document number `place`: the reason for removal or None, the record of its copy, and the remaining text.
        """
        step, text = self._step, document["text"]
        assert step is not None
        if step.name == "sample":
            beyond = self._most is not None and bin_of(document["sha256"], step.options["seed"]) >= self._most
            return "beyond the budget" if beyond else None, None, text
        begin = self._at
        while self._at < len(self._dropped) and self._dropped["document"][self._at] == place:
            self._at += 1
        mine = self._dropped[begin : self._at]
        if not len(mine):
            return None, None, text
        if step.name != "duplicated_paragraphs":
            of = "equal to another" if step.name == "exact_duplicates" else "nearly equal to another"
            return of, mine[0], text
        dropped = set(mine["place"].tolist())
        text = "\n".join(line for number, line in enumerate(text.split("\n")) if number not in dropped)
        return (None, None, text) if text.strip() else ("nothing is left", mine[0], text)


# ---- Benchmarks ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _questions(
    path: str, ngram: int, minimum: int, characters: int, minimum_characters: int, most: int
) -> tuple[NGrams, list[Question], np.ndarray]:
    """The n-grams of the benchmarks' questions, the questions, and an all-false mask of questions to exclude."""
    questions = [Question(task, own, tuple(parts)) for task, own, parts in json.loads(epath.Path(path).read_text())]
    ngrams = index(questions, Lengths(ngram, minimum), Lengths(characters, minimum_characters), most)
    return ngrams, questions, np.zeros(len(questions), bool)


def _overlap(job: Job, step: Step, text: str, overlaps: dict[str, dict[str, str]]) -> str | None:
    """The reason to remove a document that contains a question, or None; adds the questions found to `overlaps`."""
    ngrams, questions, none = _questions(f"{job.folder}/questions.json", **step.options)
    matched = ngrams.matches(ngrams.number(words(text)), none)
    if not len(matched):
        return None
    first: dict[int, int] = {}
    for ngram in matched.tolist():
        first.setdefault(int(ngrams.question[ngram]), ngram)
    for number, ngram in first.items():
        question = questions[number]
        overlaps.setdefault(question.task, {}).setdefault(question.id, ngrams.texts([ngram])[0][:SHOWN])
    return f"holds a question of {', '.join(sorted({questions[number].task for number in first}))}"
