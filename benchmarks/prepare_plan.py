"""The cost of `t5x prepare` on many machines: the tables of docs/prepare_at_scale.md.

    python -m benchmarks.prepare_plan --records=prepare.json                 measures, in a minute or two
    python -m benchmarks.prepare_plan --records=prepare.json --vcpu_hour=0.03        the same records at another price

The cost of each step is measured on this machine, on the texts in every Python, in seconds of processor time: rules
alone; decontamination, and steps that need all documents, as a whole preparation with only that step minus one without
steps. Sizes of data between the stages are those of its files.

All prices and sizes are flags; the defaults of prices are assumptions, not offers.
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.prepare import megabytes, read, some, write
from codellm_jax.prepare.job import EDGE
from codellm_jax.prepare.keys import BYTES_A_FILE, RANGES
from codellm_jax.prepare.prepare import LEAST_PART, MOST_PARTS, Preparation, prepare
from codellm_jax.prepare.ranged import index_bytes
from codellm_jax.prepare.reduction import BYTES_A_BUCKET
from codellm_jax.prepare.steps import EDITS, FILTERS, apply, steps_of
from tasks.benchmarks.judging import Benchmarks
from tasks.corpora.inputs import Inputs

ROUNDS = 3
# The steps of gin/prepare.gin: for prose, for code, and for both.
SHIPPED = {
    "text": ("special_symbols", "repeated_paragraphs", "minimum_length", "title_only"),
    "code": ("generated", "minified", "line_lengths", "alphanumeric_share", "parses", "test_files"),
    "both": ("mask_secrets", "mask_e_mails", "exact_duplicates", "near_duplicates", "decontaminate")}
OF_ALL = ("exact_duplicates", "near_duplicates")
BANDS, ROWS = 14, 8
ROUNDS_OF_JOINING = 10  # an estimate; chains of near duplicates are short
NAMES_A_LIST = 1000  # in a response of gs://
TASKS = ("logic", "jecqa", "scienceqa", "ekar", "cosqa", "c3", "ocnli", "cmnli", "mbpp", "dureader")
PARAGRAPHS = "duplicated_paragraphs"


# ---- Measuring -----------------------------------------------------------------------------------


def measure(most: float) -> dict[str, Any]:
    """Core seconds per MB of each step, and bytes between the stages."""
    texts = {pool: some(read({"python": pool}), most) for pool in ("text", "code")}
    sizes = {pool: megabytes(found) for pool, found in texts.items()}
    seconds: dict[str, float] = {}
    for step in steps_of([name for name in (*EDITS, *FILTERS) if name != "licence"], ["text.web"]):
        pool = "code" if step.sources == ("code",) else "text"
        fields = [{"text": text, "file": "a.py", "language": "python" if pool == "code" else None, "license": None}
                  for text in texts[pool]]
        apply(step, fields[0])  # loads its resources
        seconds[step.name] = min(_taken(step, fields) for _ in range(ROUNDS)) / sizes[pool]
    together = texts["text"] + texts["code"]
    whole = sum(sizes.values())
    with tempfile.TemporaryDirectory() as name:
        pattern = write(Path(name) / "texts", together)
        nothing, _ = _prepared(Path(name), pattern, [])
        seconds["read, hash, write"] = nothing / whole
        between = {}
        for step_name in (*OF_ALL, PARAGRAPHS, "decontaminate"):
            taken, between[step_name] = _prepared(Path(name), pattern, [step_name])
            seconds[step_name] = max(0.0, taken - nothing) / whole
    return {"documents": len(together), "megabytes": whole, "seconds_a_megabyte": seconds, "bytes_between": between}


def _taken(step: Any, fields: Sequence[Mapping[str, Any]]) -> float:
    began = time.process_time()
    for each in fields:
        apply(step, each)
    return time.process_time() - began


def _prepared(folder: Path, pattern: str, steps: Sequence[Any]) -> tuple[float, dict[str, int]]:
    """Seconds of a preparation until its card, and the bytes of its first stage's files by kind."""
    found: dict[str, int] = {}
    taken = []
    for turn in range(ROUNDS):
        output = folder / f"{'-'.join(steps) or 'nothing'}{turn}"
        began = time.process_time()
        ends: list[float] = []

        def staged(line: str, output: Path = output, ends: list[float] = ends) -> None:
            if not line.startswith("stage "):
                return
            ends.append(time.process_time())
            if len(ends) == 1:
                for file in Path(f"{output}.building", "stage0").iterdir():
                    kind = file.name.split("-")[0]
                    index = index_bytes(RANGES) if kind == "keys" else 0  # one per file of any size
                    found[kind] = found.get(kind, 0) + file.stat().st_size - index

        found.clear()
        prepare(Preparation(Inputs({"text.web": {"parquet": pattern}}), steps, str(output), Benchmarks(None), TASKS), 1,
                report=staged)
        taken.append(ends[-1] - began)
    return min(taken), found


# ---- Planning ------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def shipped_share(name: str, code: float) -> float:
    """The fraction of a corpus to which a shipped step applies, if the fraction `code` of it is code."""
    return 1.0 if name in SHIPPED["both"] else code if name in SHIPPED["code"] else 1 - code


def core_seconds(records: Mapping[str, Any], code: float) -> float:
    """Core seconds per MB of all shipped steps, each on all text to which it applies."""
    seconds = records["seconds_a_megabyte"]
    return seconds["read, hash, write"] + sum(
        seconds[name] * shipped_share(name, code) for name in itertools.chain(*SHIPPED.values()))


def plan(records: Mapping[str, Any], flags: argparse.Namespace, terabytes: float) -> dict[str, float]:
    """The amounts of a preparation of this many terabytes of text."""
    text = terabytes * 1e12
    documents = text / flags.bytes_a_document
    near, parquet = records["bytes_between"]["near_duplicates"], records["bytes_between"]["exact_duplicates"]
    stored = parquet["documents"] / (records["megabytes"] * 1e6)  # bytes of Parquet per byte of text
    of_documents = {"exact": parquet["keys"] / records["documents"], "keys": near["keys"] / records["documents"],
                    "signed": near["signed"] / records["documents"]}
    shingles = near.get("shingles", 0) / (records["megabytes"] * 1e6)
    between = documents * sum(of_documents.values()) + text * shingles
    hours = text / 1e6 * core_seconds(records, flags.code) / flags.speed / 3600
    parts = text / max(flags.part_bytes or LEAST_PART, 0 if flags.part_bytes else text / MOST_PARTS)
    units = parts * math.ceil(documents * of_documents["keys"] / parts / BYTES_A_FILE)
    exact, buckets = (min(RANGES, 2 ** math.ceil(math.log2(documents * of_documents[name] / BYTES_A_BUCKET + 1)))
                      for name in ("exact", "keys"))
    # An upper bound: near duplicates bring their data in each band in which two agree, each time to others.
    near_documents = documents * flags.duplicates
    brought = near_documents * BANDS * flags.similarity**ROWS * (
        of_documents["signed"] + flags.bytes_a_document * shingles)
    joining = min(RANGES, 2 ** math.ceil(math.log2(2 * near_documents * EDGE.itemsize / BYTES_A_BUCKET + 1)))
    # Each stage but the last writes documents that the next one reads; keys are written once and read once.
    moved = text * stored * (2 * len(OF_ALL) + 1) + 2 * between + 2 * brought
    # Two requests each: for the beginning of a range, and for the range.
    of_exact = 2 * exact * (units + parts)  # keys by buckets; removed documents by parts
    of_near = 2 * 3 * units * buckets  # keys, matches, and data for comparison
    of_joining = 2 * joining * (buckets + ROUNDS_OF_JOINING * joining + parts)
    # A stage's folder, with eight files per part, is listed for each bucket, unit and part.
    lists = 8 * parts / NAMES_A_LIST * (exact + 2 * buckets + ROUNDS_OF_JOINING * joining + units + 2 * parts)
    return {"documents": documents, "core_hours": hours, "between": between, "brought": brought, "moved": moved,
            "stored": text * stored, "parts": parts, "exact": exact, "buckets": buckets, "of_exact": of_exact,
            "of_near": of_near, "of_joining": of_joining, "lists": lists}


def tables(records: Mapping[str, Any], flags: argparse.Namespace) -> str:
    """The tables as Markdown."""
    seconds = records["seconds_a_megabyte"]
    shipped = set(itertools.chain(*SHIPPED.values()))

    def row(name: str) -> list[str]:
        share = shipped_share(name, flags.code) if name in shipped else 1.0
        looked = "all" if share == 1 else f"{share:.0%}"
        hours = share * seconds[name] / flags.speed / 3600
        cells = [f"{terabytes * 1e6 * hours:,.1f}" for terabytes in flags.terabytes]
        return [name, f"{1 / seconds[name]:,.1f}" if seconds[name] > 1e-4 else "over 10,000", looked, *cells]

    sizes = [f"{terabytes * 1000:,.0f} GB" for terabytes in flags.terabytes]
    head = ["step", "MB/s per core", "of the text", *(f"core hours, {size}" for size in sizes)]
    of_steps = table(head, [row("read, hash, write"), *(row(name) for names in SHIPPED.values() for name in names)])
    others = table(head, [row(name) for name in sorted(seconds) if name not in shipped and name != "read, hash, write"])
    plans = [plan(records, flags, terabytes) for terabytes in flags.terabytes]
    amounts = table(["", *sizes], [
        ["documents, millions", *(f"{one['documents'] / 1e6:,.0f}" for one in plans)],
        ["core hours", *(f"{one['core_hours']:,.0f}" for one in plans)],
        ["documents between stages, GB of Parquet", *(f"{one['stored'] / 1e9:,.0f}" for one in plans)],
        ["keys, signatures and shingles, GB", *(f"{one['between'] / 1e9:,.0f}" for one in plans)],
        ["brought to be compared, at most, GB", *(f"{one['brought'] / 1e9:,.0f}" for one in plans)],
        ["written and read between stages, GB", *(f"{one['moved'] / 1e9:,.0f}" for one in plans)],
        ["parts", *(f"{one['parts']:,.0f}" for one in plans)],
        ["buckets of exact and of near duplicates",
         *(f"{one['exact']:,.0f} and {one['buckets']:,.0f}" for one in plans)],
        ["requests for exact duplicates, millions", *(f"{one['of_exact'] / 1e6:,.1f}" for one in plans)],
        ["requests for near duplicates, millions", *(f"{one['of_near'] / 1e6:,.1f}" for one in plans)],
        ["requests for joining pairs, millions", *(f"{one['of_joining'] / 1e6:,.1f}" for one in plans)],
        ["lists of files, millions", *(f"{one['lists'] / 1e6:,.2f}" for one in plans)]])
    systems = {"Dataflow": flags.vcpu_hour + flags.memory * flags.gigabyte_hour,
               "Spark": flags.vm_hour + flags.spark_hour}
    rows = []
    for system, rate in systems.items():
        for size, one in zip(sizes, plans, strict=True):
            computing = one["core_hours"] * rate
            kept = one["stored"] * 2 + one["between"] + one["brought"]
            storing = kept / 1e9 * flags.gigabyte_month * flags.days / 30
            requests = one["of_exact"] + one["of_near"] + one["of_joining"]
            asking = requests / 1e6 * flags.million_reads + one["lists"] / 1e6 * flags.million_lists
            seconds_of_one = flags.milliseconds / 1000 / 3600 / flags.cores
            waiting = (requests / flags.at_once + one["lists"]) * seconds_of_one
            hours = one["core_hours"] / flags.cores + flags.start / 60
            rows.append([system, size, f"{hours:,.1f}", f"{waiting:,.1f}", f"{computing:,.0f}", f"{storing:,.0f}",
                         f"{asking:,.0f}", f"{computing + storing + asking:,.0f}"])
    costs = table(["", "text", f"hours on {flags.cores:,} vCPUs", "and waiting in gs://, hours", "computing, $",
                   "storage between, $", "requests, $", "together, $"], rows)
    return "\n\n".join(["Shipped steps:", of_steps, "Steps that a file may add:", others, "Amounts:", amounts,
                        "Time and cost:", costs])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--records", default="prepare.json", help="what was measured; it is measured where there is none")
    made.add_argument("--megabytes", type=float, default=4, help="of each pool, at most (default: %(default)s)")
    for name, value, told in (
            ("code", 1 / 3, "the share of the text that is code"),
            ("bytes_a_document", 4000, "of UTF-8, on average"),
            ("duplicates", 0.2, "the share of documents that have near duplicates"),
            ("similarity", 0.95, "of near duplicates, on average"),
            ("part_bytes", 0, "prepare.part_bytes; 0 for None"),
            ("speed", 1.0, "of a core there, of one here"),
            ("cores", 256, "vCPUs"),
            ("start", 5, "minutes until machines work"),
            ("days", 2, "for which what lies between the stages is kept"),
            ("vcpu_hour", 0.056, "$ of a vCPU on Dataflow"),
            ("gigabyte_hour", 0.0036, "$ of a GB of memory on Dataflow"),
            ("memory", 4, "GB of memory a vCPU"),
            ("vm_hour", 0.049, "$ of a vCPU with its memory under Spark"),
            ("spark_hour", 0.010, "$ of Spark's service a vCPU"),
            ("gigabyte_month", 0.02, "$ of a GB of storage"),
            ("million_reads", 0.40, "$ of a million requests to read"),
            ("million_lists", 5.0, "$ of a million requests to list"),
            ("at_once", 32, "requests to read that a worker has under way"),
            ("milliseconds", 20.0, "until a request is answered")):
        made.add_argument(f"--{name}", type=type(value), default=value, help=f"{told} (default: {value:.4g})")
    made.add_argument("--terabytes", type=float, nargs="+", default=[0.15, 10], help="of text (default: 0.15 10)")
    return made


def main() -> None:
    flags = parser().parse_args()
    path = Path(flags.records)
    if not path.exists():
        path.write_text(json.dumps(measure(flags.megabytes), indent=1) + "\n")
    print(tables(json.loads(path.read_text()), flags))


if __name__ == "__main__":
    main()
