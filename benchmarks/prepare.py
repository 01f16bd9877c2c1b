"""`t5x prepare` compared with datatrove on the same texts and thresholds, in one run on one core; and its memory.

    pip install '.[prepare]' 'datatrove[io,processing]' spacy
    python -m benchmarks.prepare                   the texts in every Python; takes minutes, mostly for datatrove
    python -m benchmarks.prepare --corpus="{'json_lines': '/data/web/*.jsonl.gz'}"       a corpus as in CORPORA
    python -m benchmarks.prepare --parts=planted,memory

  read        Parquet files to documents
  rules       the rules of Gopher, C4 and FineWeb, each alone, on fewer of the texts; how often both tools agree
  signatures  MinHash signatures of 14 x 8 hashes of 5-grams
  duplicates  near-duplicate removal, Parquet to Parquet, with signatures, comparison, clusters and filter
  planted     the same on pairs of known Jaccard similarity: of how many pairs each tool removes a text
  memory      the peak resident memory of a process that applies rules and duplicates to generated texts, and to four
              times as many

MB are of UTF-8; time is processor time of all threads of the process.
"""

import argparse
import ast
import contextlib
import multiprocessing
import random
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from codellm_jax.prepare import duplicates, quality
from codellm_jax.prepare.prepare import Preparation, prepare
from tasks.corpora.inputs import Inputs

BYTES_A_FILE = 4_000_000
PAIRS, VOCABULARY = 1500, 20_000
CHANGED = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)  # fractions of a copy's words
BANDS_OF_SIMILARITY = ((0.0, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.85), (0.85, 0.9), (0.9, 1.01))
MEGABYTES_IN_MEMORY = (64, 256)


class Turns(NamedTuple):
    """Seconds of ours and theirs in each turn, and the results of the last turn."""

    ours: list[float]
    theirs: list[float]
    results: tuple[Any, Any]


def turns(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> Turns:
    seconds: tuple[list[float], list[float]] = ([], [])
    results: list[Any] = [None, None]
    for _ in range(rounds):
        for side, work in enumerate((ours, theirs)):
            began = time.process_time()
            results[side] = work()
            seconds[side].append(time.process_time() - began)
    return Turns(*seconds, (results[0], results[1]))


def told(name: str, size: float, found: Turns) -> None:
    """Prints MB/s of both, and the speedup of ours."""
    ratios = [theirs / ours for ours, theirs in zip(found.ours, found.theirs, strict=True)]
    print(f"{name:<20}{size / statistics.median(found.ours):>9.2f} MB/s, datatrove"
          f"{size / statistics.median(found.theirs):>9.2f}: {statistics.median(ratios):.2f} times as fast "
          f"({min(ratios):.2f}-{max(ratios):.2f})", flush=True)


def megabytes(texts: Sequence[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


# ---- Texts ---------------------------------------------------------------------------------------


def read(spec: Mapping[str, Any]) -> list[str]:
    """All documents of a corpus."""
    inputs = Inputs({"text.benchmark": spec})
    files = inputs.files("text.benchmark")
    found = inputs.documents("text.benchmark", files and [name for name, _, _ in files])
    return [each.text for each in found if each.text is not None]


def some(texts: Sequence[str], most: float) -> list[str]:
    """A random sample of texts, up to `most` megabytes."""
    drawn, size = [], 0
    for text in random.Random(0).sample(texts, len(texts)):
        size += len(text.encode())
        if size > most * 1e6:
            break
        drawn.append(text)
    return drawn


def word(dice: random.Random) -> str:
    return "".join(dice.choices("abcdefghijklmnoprstuvwy", k=dice.randrange(2, 10)))


def pairs(count: int) -> Iterator[tuple[str, str]]:
    """Yields texts of 100 to 600 random words, each with a copy in which some words are replaced."""
    dice = random.Random(7)
    vocabulary = [word(dice) for _ in range(VOCABULARY)]
    for number in range(count):
        text = dice.choices(vocabulary, k=dice.randrange(100, 600))
        share = CHANGED[number % len(CHANGED)]
        yield " ".join(text), " ".join(f"new{word(dice)}" if dice.random() < share else each for each in text)


def write(folder: Path, texts: Iterator[str] | Sequence[str]) -> str:
    """Writes texts to Parquet files with their numbers as ids; returns the pattern of the files."""
    folder.mkdir(parents=True)
    rows: list[dict[str, str]] = []
    size = files = 0

    def flush() -> None:
        nonlocal files, size
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{files:05d}.parquet", compression="zstd")
        rows.clear()
        files, size = files + 1, 0

    for number, text in enumerate(texts):
        rows.append({"id": str(number), "text": text})
        size += len(text.encode())
        if size >= BYTES_A_FILE:
            flush()
    if rows:
        flush()
    return str(folder / "*.parquet")


# ---- Parts ---------------------------------------------------------------------------------------


def reading(folder: Path, texts: Sequence[str], rounds: int) -> None:
    from datatrove.pipeline.readers import ParquetReader

    pattern = write(folder / "texts", texts)
    found = turns(lambda: len(read({"parquet": pattern})),
                  lambda: sum(1 for _ in ParquetReader(str(folder / "texts")).run()), rounds)
    assert found.results == (len(texts), len(texts))
    told("read", megabytes(texts), found)


def rules(texts: Sequence[str], rounds: int) -> None:
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )

    contenders: dict[str, tuple[Callable[[str], str | None], Any]] = {
        "gopher_quality": (quality.gopher_quality, GopherQualityFilter()),
        "gopher_repetition": (quality.gopher_repetition, GopherRepetitionFilter()),
        "c4_lines, c4_page": (lambda text: quality.c4_page(quality.c4_lines(text)),
                              C4QualityFilter(min_num_sentences=3, min_words_per_line=5)),
        "fineweb_quality": (quality.fineweb_quality, FineWebQualityFilter())}
    for name, (ours, theirs) in contenders.items():
        theirs.filter(Document(text="Loads what it needs.", id=""))
        found = turns(lambda ours=ours: [ours(text) is None for text in texts],
                      lambda theirs=theirs: [theirs.filter(Document(text=text, id="")) is True for text in texts],
                      rounds)
        told(name, megabytes(texts), found)
        mine, others = found.results
        print(f"    kept {sum(mine)} and {sum(others)} of {len(texts)}, decided alike "
              f"{sum(map(bool.__eq__, mine, others)) / len(texts):.2%}")


def signatures(texts: Sequence[str], rounds: int) -> None:
    from datatrove.pipeline.dedup import MinhashDedupSignature

    theirs = MinhashDedupSignature(output_folder="memory://signatures", config=_datatrove_config())

    def ours() -> None:
        for text in texts:
            hashes = duplicates.shingles(text, 5)
            if len(hashes):
                duplicates.signature(hashes, 14 * 8)

    def of_datatrove() -> None:
        for text in texts:
            hashes = theirs.get_shingles(text)
            if hashes.size:
                theirs.get_signature(hashes)

    of_datatrove_once = theirs.get_shingles("Loads what it needs.")
    assert of_datatrove_once is not None
    told("signatures", megabytes(texts), turns(ours, of_datatrove, rounds))


def near_duplicates(folder: Path, texts: Sequence[str], rounds: int) -> None:
    pattern = write(folder / "texts", texts)
    found = turns(lambda: removed_by_ours(folder, pattern), lambda: removed_by_datatrove(folder), rounds)
    told("duplicates", megabytes(texts), found)
    print(f"    removed {len(found.results[0])} and {len(found.results[1])} of {len(texts)}")


def removed_by_ours(folder: Path, pattern: str, **options: float) -> set[int]:
    """The numbers of the texts that the step near_duplicates of `t5x prepare` removes."""
    output = folder / "ours"
    shutil.rmtree(output, ignore_errors=True)
    inputs = Inputs({"text.benchmark": {"parquet": pattern}})
    step = {"name": "near_duplicates", **options}
    prepare(Preparation(inputs, [step], str(output)), 1, report=lambda line: None)
    starts, begin = {}, 0
    for file in sorted((folder / "texts").iterdir()):
        starts[str(file)] = begin
        begin += pq.ParquetFile(file).metadata.num_rows
    rows = [row for file in (output / "removed").iterdir() for row in pq.read_table(file).to_pylist()]
    return {starts[row["file"]] + row["row"] - 1 for row in rows}


def _datatrove_config() -> Any:
    from datatrove.pipeline.dedup.minhash import MinhashConfig

    return MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)


def removed_by_datatrove(folder: Path) -> set[int]:
    """The numbers of the texts that datatrove's MinHash deduplication removes."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter

    output, config = folder / "theirs", _datatrove_config()
    shutil.rmtree(output, ignore_errors=True)
    reader = ParquetReader(str(folder / "texts"))
    writers = [ParquetWriter(str(output / name), compression="zstd") for name in ("kept", "gone")]
    for step, (tasks, pipeline) in enumerate((
            (1, [reader, MinhashDedupSignature(str(output / "signatures"), config)]),
            (14, [MinhashDedupBuckets(str(output / "signatures"), str(output / "buckets"), config=config)]),
            (1, [MinhashDedupCluster(str(output / "buckets"), str(output / "remove"), config)]),
            (1, [reader, MinhashDedupFilter(str(output / "remove"), writers[1]), writers[0]]))):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(output / f"log{step}")).run()
    return {int(row) for file in (output / "gone").glob("*.parquet") for row in pq.read_table(file)["id"].to_pylist()}


def planted(folder: Path) -> None:
    """Prints the recall of both tools on the pairs, by true similarity, and their precision."""
    texts = list(pairs(PAIRS))
    similar = [jaccard(*pair) for pair in texts]
    pattern = write(folder / "texts", [text for pair in texts for text in pair])
    gone = {"ours": removed_by_ours(folder, pattern), "ours, 'similarity': 0": removed_by_ours(
        folder, pattern, similarity=0), "datatrove": removed_by_datatrove(folder)}
    found = {name: {number // 2 for number in removed} for name, removed in gone.items()}
    print(f"planted: {PAIRS} pairs; of those of similarity s 1 - (1 - s^8)^14 agree in a band")
    for low, high in BANDS_OF_SIMILARITY:
        those = [number for number, value in enumerate(similar) if low <= value < high]
        expected = statistics.mean(1 - (1 - similar[number] ** 8) ** 14 for number in those)
        shares = ", ".join(f"{name} {sum(number in each for number in those) / len(those):.3f}"
                           for name, each in found.items())
        print(f"    similarity {low:.2f} to {min(high, 1):.2f}, {len(those)} pairs: {shares}, expected of bands "
              f"{expected:.3f}")
    for least in (0.7, 0.85):
        of_least = {number for number, value in enumerate(similar) if value >= least}
        for name, each in found.items():
            print(f"    similarity {least} and more, {name}: recall {len(each & of_least) / len(of_least):.3f}, "
                  f"precision {len(each & of_least) / len(each):.3f}")


def jaccard(one: str, other: str) -> float:
    """The Jaccard similarity of two texts' 5-grams of words between blanks."""
    first, second = ({tuple(found[at : at + 5]) for at in range(len(found) - 4)}
                     for found in (one.split(), other.split()))
    return len(first & second) / len(first | second)


def memory(folder: Path) -> None:
    """Prints the peak resident memory of processes that prepare generated texts, of sizes four times apart."""
    for size in MEGABYTES_IN_MEMORY:
        with multiprocessing.get_context("spawn").Pool(1) as child:
            before, most = child.apply(most_resident, (folder / str(size), size))
        print(f"memory: {size} MB of texts, {most:.0f} MB resident at most, {before:.0f} with the library alone",
              flush=True)


def most_resident(folder: Path, size: int) -> tuple[float, float]:
    """This process's peak resident memory in MB, before and after it prepares texts of `size` MB."""
    def endless() -> Iterator[str]:
        left = size * 1e6
        for pair in pairs(10**9):
            for text in pair:
                yield text
                left -= len(text)
            if left < 0:
                return

    pattern = write(folder / "texts", endless())
    inputs = Inputs({"text.benchmark": {"parquet": pattern}})
    steps = ["special_symbols", "repeated_paragraphs", "minimum_length", "exact_duplicates", "near_duplicates"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    prepare(Preparation(inputs, steps, str(folder / "out")), 1, report=lambda line: None)
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


PARTS = ("read", "rules", "signatures", "duplicates", "planted", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", help="a spec of CORPORA (default: prose and code that every Python holds)")
    parser.add_argument("--megabytes", type=float, default=16, help="of its texts, at most (default: %(default)s)")
    parser.add_argument("--megabytes_of_rules", type=float, default=0.5, help="for the rules (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="of what is measured (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    if unknown := set(flags.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: there is no {unknown.pop()}; they are {', '.join(PARTS)}")
    _quiet_datatrove()
    specs = [ast.literal_eval(flags.corpus)] if flags.corpus else [{"python": "text"}, {"python": "code"}]
    texts = some([text for spec in specs for text in read(spec)], flags.megabytes)
    print(f"{len(texts)} texts, {megabytes(texts):.1f} MB")
    for part in flags.parts.split(","):
        with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
            folder = Path(name)
            if part == "read":
                reading(folder, texts, flags.rounds)
            elif part == "rules":
                rules(some(texts, flags.megabytes_of_rules), flags.rounds)
            elif part == "signatures":
                signatures(texts, flags.rounds)
            elif part == "duplicates":
                near_duplicates(folder, texts, flags.rounds)
            elif part == "planted":
                planted(folder)
            else:
                memory(folder)


def _quiet_datatrove() -> None:
    """Silences datatrove's log, which prints a line for each step."""
    with contextlib.suppress(ModuleNotFoundError):  # some parts do not need datatrove
        from loguru import logger

        logger.disable("datatrove")


if __name__ == "__main__":
    main()
