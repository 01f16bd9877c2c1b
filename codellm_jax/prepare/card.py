"""The data card: the input, the documents removed by each step, and the result, as Markdown and HTML.

All numbers are counts of the files beside it: every document read is a row of documents-*.parquet or of removed/.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from codellm_jax.prepare import ranged
from codellm_jax.prepare.duplicates import chance_to_meet
from codellm_jax.prepare.job import SAMPLES, Job
from codellm_jax.prepare.shapes import SHARES, joined
from codellm_jax.report.pages import Block, Figure, Heading, Items, Table, Text, markdown, page
from codellm_jax.report.plots import Profile, profiles
from codellm_jax.results.files import write_whole

Facts = Sequence[Sequence[Mapping[str, Any]]]  # by stage and part
SHOWN = 160  # characters of a sample
REASONS = 10
NAMED = 20  # licences and languages


def write_card(
    output: epath.Path, plan: Mapping[str, Any], job: Job, facts: Facts, sources: Sequence[str]
) -> dict[str, Any]:
    """Writes README.md with its plot, and card.html, to a folder; returns the counts shown, as JSON.

    Args:
      output: the folder.
      plan: inputs and steps, as in the manifest.
      job, facts: the work, and the facts written by each part in each stage.
      sources: the corpora, in the order of the output.
    """
    counts = _counts(job, facts, sources)
    blocks = _blocks(plan, job, counts, _samples(job, facts))
    for block in blocks:
        if isinstance(block, Figure):
            ranged.write_bytes(output / f"{block.name}.png", block.png)
    title = f"Data card: {', '.join(sources)}"
    write_whole(output / "README.md", markdown(title, blocks))
    write_whole(output / "card.html", page(title, blocks))
    return counts


def _counts(job: Job, facts: Facts, sources: Sequence[str]) -> dict[str, Any]:
    """The counts by corpus: {"sources": the documents read and remaining, "steps": a list of each step's effects,
    "overlaps": by benchmark, the questions found with one n-gram each}.
    """
    of_source = {source: [part for part, one in enumerate(job.parts) if one.source == source] for source in sources}
    found: dict[str, Any] = {"sources": {}, "steps": [], "overlaps": {}}
    for source, own in of_source.items():
        read = [facts[0][part] for part in own]
        found["sources"][source] = {
            "documents": sum(one["read"]["documents"] for one in read),
            "bytes": sum(one["read"]["bytes"] for one in read), "tokens": sum(one["read"]["tokens"] for one in read),
            "lost": _sum(one["lost"] for one in read),
            "left": joined(facts[-1][part]["shape"] for part in own)}
    for number, step in enumerate(job.steps):
        by_source = {}
        for source, own in of_source.items():
            each = [stage[part]["steps"][str(number)] for stage in facts for part in own
                    if str(number) in stage[part]["steps"]]
            if step.looks_at(source):
                by_source[source] = {key: sum(one[key] for one in each) for key in (
                    "documents", "bytes", "tokens", "removed", "removed_bytes", "removed_tokens", "changed",
                    "bytes_dropped", "tokens_dropped")}
                by_source[source] |= {key: _sum(one[key] for one in each) for key in ("reasons", "copies")}
        found["steps"].append({"name": step.name, "sources": by_source})
    for stage in facts:
        for part, one in enumerate(stage):
            for task, ids in one["overlaps"].items():
                for own_id, ngram in ids.items():
                    found["overlaps"].setdefault(task, {}).setdefault(job.parts[part].source, {}).setdefault(
                        own_id, ngram)
    return found


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    whole: Counter[str] = Counter()
    for each in counts:
        whole.update(each)
    return dict(sorted(whole.items()))


def _samples(job: Job, facts: Facts) -> dict[int, list[dict[str, Any]]]:
    """Some removed documents for each step, those with the lowest hashes."""
    found: dict[int, list[dict[str, Any]]] = {}
    for stage in facts:
        for part in stage:
            for number, one in part["steps"].items():
                found.setdefault(int(number), []).extend(one["samples"])
    return {number: sorted(samples, key=lambda one: (one["sha256"], one["file"], one["row"]))[:SAMPLES]
            for number, samples in found.items()}


# ---- The page ------------------------------------------------------------------------------------


def _blocks(
    plan: Mapping[str, Any], job: Job, counts: Mapping[str, Any], samples: Mapping[int, Sequence[Mapping[str, Any]]]
) -> list[Block]:
    sources = counts["sources"]
    left = sum(one["left"]["documents"] for one in sources.values())
    read = sum(one["documents"] for one in sources.values())
    units = ["bytes", "tokens"] if plan["vocabulary"] else ["bytes"]
    corpora = [[name, _files(plan, name), f"{one['documents']:,}", *(f"{one[unit]:,}" for unit in units),
                _reasons(one["lost"]), f"{one['left']['documents']:,}",
                *(cell for unit in units for cell in (f"{one['left'][unit]:,}", _share(one["left"][unit], one[unit])))]
               for name, one in sources.items()]
    steps = [[label, source, f"{one['documents']:,}", f"{one['removed']:,}", _share(one["removed"], one["documents"]),
              f"{one['documents'] - one['removed']:,}", f"{one['changed']:,}", *(
                  cell for unit in units for cell in (
                      f"{one[unit]:,}", f"{one[unit] - one[f'removed_{unit}'] - one[f'{unit}_dropped']:,}"))]
             for label, source, one in _by_step(counts)]
    told = "Bytes are of UTF-8 text. Records without a document are unreadable or empty."
    if plan["vocabulary"]:
        told += (f" Tokens are of {_quoted(plan['vocabulary'])}, hash `{plan['vocabulary_sha256'][:16]}`, with those "
                 "that begin and end a document.")
    reasons = [[label, source, _quoted(reason), f"{count:,}"] for label, source, one in _by_step(counts)
               for reason, count in sorted(one["reasons"].items(), key=lambda each: -each[1])[:REASONS]]
    return [
        Text(f"Prepared by `t5x prepare`: {len(job.steps)} steps leave {left:,} of {read:,} documents. Each document "
             "that was read is a row of `documents-*` or of `removed/*.parquet`, with the file and row that it "
             f"comes from, so these counts can be verified. Steps: `{plan['steps_sha256'][:16]}`, inputs: "
             f"`{plan['inputs_sha256'][:16]}`; `manifest.json` has both in full."),
        Heading(2, "Corpora"),
        Table(told, ["corpus", "files", "documents read", *(f"{unit} read" for unit in units),
                     "records without a document", "documents left",
                     *(cell for unit in units for cell in (f"{unit} left", "of them"))], corpora,
              words=[3 + len(units)]),
        Heading(2, "Steps"),
        Table("In the order of execution. A step that does not apply to a corpus is omitted there.",
              ["step", "corpus", "documents before", "removed", "of them", "documents after", "changed", *(
                  f"{unit} {when}" for unit in units for when in ("before", "after"))], steps, words=[1]),
        *([Table(f"Why documents were removed: the {REASONS} commonest reasons of each step and corpus.",
                 ["step", "corpus", "reason", "documents"], reasons, words=[1, 2])] if reasons else []),
        *_near_duplicates(job), *_figures(counts), *_shape_blocks(sources), *_copies(counts), *_overlaps(plan, counts),
        *_sample_blocks(job, samples),
        Heading(2, "Inputs and options"),
        Items([f"{one['source']}: {_quoted(json.dumps(one['spec'], ensure_ascii=False))}" for one in plan["inputs"]]),
        Items([f"{number}. {_quoted(json.dumps(step, ensure_ascii=False))}"
               for number, step in enumerate(plan["steps"], 1)])]


def _near_duplicates(job: Job) -> list[Block]:
    """The expected share of near duplicates found."""
    found = []
    for number, step in enumerate(job.steps, 1):
        if step.name == "near_duplicates":
            similarity, bands, rows = (step.options[key] for key in ("similarity", "bands", "rows"))
            told = f"joins pairs of a Jaccard similarity of at least {similarity:g}" if similarity else \
                "joins all pairs that agree in a band"
            chances = ", ".join(f"{chance_to_meet(value, bands, rows):.1%} at {value:g}" for value in sorted(
                {0.7, 0.8, 0.9, similarity} - {0}) if value >= similarity)
            found.append(f"{number}. near_duplicates {told}. With {bands} x {rows} hashes it finds {chances}.")
    return [Items(found)] if found else []


def _by_step(counts: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Each step with its number, a corpus, and the step's effect there."""
    for number, step in enumerate(counts["steps"], 1):
        for source, one in step["sources"].items():
            yield f"{number}. {step['name']}", source, one


def _figures(counts: Mapping[str, Any]) -> list[Block]:
    """The documents left after each step, and their lengths; none if nothing was read."""
    sources = {name: one for name, one in counts["sources"].items() if one["documents"]}
    if not sources:
        return []
    labels = ["read", *(f"{number}. {step['name']}" for number, step in enumerate(counts["steps"], 1))]
    after: dict[str, list[float]] = {}
    for name, one in sources.items():
        left = one["documents"]
        after[name] = [100.0]
        for step in counts["steps"]:
            left -= step["sources"].get(name, {"removed": 0})["removed"]
            after[name].append(100 * left / one["documents"])
    shapes = {name: one["left"] for name, one in sources.items() if one["left"]["documents"]}
    panels = [Profile("Documents left", labels, after)]
    if shapes:
        found = sorted({int(bin) for shape in shapes.values() for bin in shape["characters"]})
        bins = range(found[0], found[-1] + 1)
        panels.append(Profile("Documents left, by characters", [f"{2**bin:,}+" for bin in bins], {
            name: [100 * shape["characters"].get(str(bin), 0) / shape["documents"] for bin in bins]
            for name, shape in shapes.items()}))
    return [profiles("steps", "Left: the documents that remain after each step, in per cent of those read. Right: the "
                     "final documents by length, from this number of characters to the next.", panels)]


def _shape_blocks(sources: Mapping[str, Any]) -> list[Block]:
    """The remaining documents by length, share of Chinese, repetition, language and licence."""
    shapes = {name: one["left"] for name, one in sources.items()}
    names = list(shapes)
    lengths = sorted({int(bin) for shape in shapes.values() for bin in shape["characters"]})
    blocks: list[Block] = [Heading(2, "Remaining documents"), Table(
        "Documents by their length in characters.", ["characters", *names],
        [[f"{2**bin:,} to {2**(bin + 1) - 1:,}", *(f"{shape['characters'].get(str(bin), 0):,}"
                                                   for shape in shapes.values())] for bin in lengths])]
    for kind, told in (
            ("chinese", "Documents by the share of Chinese characters among those that are not white space."),
            ("repeated", "Documents by the share of characters in lines that repeat an earlier line of the same "
                         "document.")):
        blocks.append(Table(told, ["share", *names], [
            [f"{100 * bin // SHARES}% to {100 * (bin + 1) // SHARES}%",
             *(f"{shape[kind].get(str(bin), 0):,}" for shape in shapes.values())] for bin in range(SHARES)]))
    for kind, told in (("languages", "Documents by the language of their file or record."),
                       ("licences", "Documents by the licence of their record.")):
        values = Counter[str]()
        for shape in shapes.values():
            values.update(shape[kind])
        blocks.append(Table(told, [kind.removesuffix("s"), *names], [
            [_quoted(value) if value else "none told", *(f"{shape[kind].get(value, 0):,}" for shape in shapes.values())]
            for value, _ in values.most_common(NAMED)]))
    return blocks


def _copies(counts: Mapping[str, Any]) -> list[Block]:
    """The corpora between which duplicates were found."""
    rows = [[label, source, copy, f"{count:,}"] for label, source, one in _by_step(counts)
            for copy, count in one["copies"].items()]
    return [Heading(2, "Duplicates across corpora"), Table(
        "Removed documents, by the corpus of the copy that is kept.",
        ["step", "removed from", "the copy is in", "documents"], rows, words=[1, 2])] if rows else []


def _overlaps(plan: Mapping[str, Any], counts: Mapping[str, Any]) -> list[Block]:
    """The benchmark questions that were found; none if no step searches for them."""
    if not plan["tasks"]:
        return []
    rows = []
    for task, questions in plan["tasks"].items():
        by_source = counts["overlaps"].get(task, {})
        found = {own for ids in by_source.values() for own in ids}
        example = next((ngram for ids in by_source.values() for _, ngram in sorted(ids.items())), "")
        rows.append([task, f"{questions:,}", f"{len(found):,}",
                     ", ".join(f"{source} {len(ids):,}" for source, ids in by_source.items()), _quoted(example)])
    return [Heading(2, "Overlap with benchmarks"), Table(
        "Questions that share an n-gram with a document; these documents were removed.",
        ["benchmark", "questions", "found", "in", "an n-gram"], rows, words=[3, 4])]


def _sample_blocks(job: Job, samples: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[Block]:
    blocks: list[Block] = []
    for number, found in sorted(samples.items()):
        if found:
            rows = [[f"{one['source']}\n{one['file']}, row {one['row']}", one["reason"] + _similar(one),
                     _quoted(one["text"][:SHOWN])] for one in found]
            blocks += [Heading(3, f"{number + 1}. {job.steps[number].name}"),
                       Table("", ["document", "reason", "beginning"], rows, words=[1, 2])]
    return [Heading(2, "Samples of removed documents"), Text(
        f"For each step up to {SAMPLES} documents, those with the lowest hashes."), *blocks] if blocks else []


def _similar(sample: Mapping[str, Any]) -> str:
    if "copy_sha256" not in sample:
        return ""
    similar = f", highest Jaccard similarity {sample['similarity']:.2f}" if sample["similarity"] < 1 else ""
    return f"\ncopy in {sample['copy_source']}, SHA-256 {sample['copy_sha256']}...{similar}"


def _quoted(text: str) -> str:
    """External text as code on one line, so that nothing in it is interpreted by the page."""
    plain = " ".join(text.replace("`", "'").split())
    return f"`{plain}`" if plain else ""


def _files(plan: Mapping[str, Any], source: str) -> str:
    files = next(one["files"] for one in plan["inputs"] if one["source"] == source)
    return "" if files is None else f"{len(files):,}"


def _reasons(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
