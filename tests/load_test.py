"""Much of everything: long lines, many files, many sources, many records, many runs."""

import json
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent

READ = """
import sys
from tasks.corpora.sources import documents
from tests.peak import peak_bytes
found = [str(text) for text in documents({"json_lines": sys.argv[1], "holdout": 0}, "train", "text.a")]
print(len(found), found[-1], peak_bytes())
"""


def test_a_line_of_two_gigabytes_is_counted_and_not_held(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with file.open("wb") as stream:
        stream.write(json.dumps({"text": "x" * 10_000}).encode() + b'\n{"text": "')
        stream.seek(2 << 30, 1)  # zeros, which take no room on the disk
        stream.write(b'"}\n{"text": "the last"}\n')
    done = subprocess.run([sys.executable, "-c", READ, str(file)], cwd=ROOT, capture_output=True, text=True, check=True)
    count, *last, peak = done.stdout.split()
    assert (count, last) == ("2", ["the", "last"]) and int(peak) < 1.3 * 2**30
    assert "skipped: 1 longer than 256 MiB" in done.stderr and "line 2" in done.stderr


def test_ten_thousand_files_are_read_one_after_the_other(tmp_path: Path) -> None:
    from tasks.corpora.sources import documents

    for number in range(10_000):
        (tmp_path / f"{number:05}.jsonl").write_text(json.dumps({"text": f"{number} " + "x" * 1000}) + "\n")
    found = documents({"json_lines": str(tmp_path / "*.jsonl"), "holdout": 0}, "train", "text.a")
    assert [int(str(text).split()[0]) for text in found] == list(range(10_000))


def test_a_thousand_sources_have_their_shares() -> None:
    from codellm_jax.mixture.order import Order, Source
    from codellm_jax.mixture.schedules import constant

    pools = ("code", "text", "text", "text")
    sources = tuple(Source(f"{pools[number % 4]}.n{number:03}", 50 + number, Fraction(1 + number % 7))
                    for number in range(1000))
    order = Order(0, constant(0.3), sources)
    rows = 50_000
    counts = order.counts(rows)
    np.testing.assert_array_equal(counts, np.bincount(order.draw(np.arange(rows)).source, minlength=1000))
    for pool, share in (("code", Fraction(3, 10)), ("text", Fraction(7, 10))):
        members = [number for number, source in enumerate(sources) if source.pool == pool]
        weights = sum(sources[number].weight for number in members)
        # Half a row at each node of a binary tree: of 750 sources ten levels, and the pools' own.
        for number in members:
            assert abs(int(counts[number]) - rows * share * sources[number].weight / weights) <= 5.5


def test_forty_eight_hours_of_records_take_no_memory(tmp_path: Path) -> None:
    """A record each ten seconds."""
    from codellm_jax.runtime.progress import Records, read_records

    values = {f"loss/text.source_{number}": 2.5 + number for number in range(10)}
    records = Records(str(tmp_path), 0, True, tensorboard=False)
    held = 0
    tracemalloc.start()
    try:
        for step in range(1, 17_281):
            records.write(step, "train", values)
            if step == 1_728:
                held = tracemalloc.get_traced_memory()[0]
        assert tracemalloc.get_traced_memory()[0] - held < 1 << 20
    finally:
        tracemalloc.stop()
        records.close()
    lines = (tmp_path / "metrics.jsonl").read_bytes().count(b"\n")
    resumed = Records(str(tmp_path), 16_000, True, tensorboard=False)
    resumed.close()
    assert lines == 17_280 and len(read_records(str(tmp_path))) == 16_000


def test_a_study_of_two_hundred_runs_is_planned() -> None:
    from codellm_jax.configuration import read_configuration
    from codellm_jax.study.execute import study_of
    from codellm_jax.study.planned import plan_as_json, planned_runs

    arms = {f"A{number}": {"CODE_RATE": number / 20} for number in range(10)} | {
        f"B{number}": {"from": f"A{number}", "CODE_RATE": 0.3} for number in range(10)}
    configuration = read_configuration(["gin/study.gin"], [("ARMS", repr(arms)), ("SEEDS", repr(list(range(10))))])
    study = study_of(configuration)
    planned, _ = planned_runs(study, configuration, ())
    assert len(planned) == 200 and len({one.folder for one in planned}) == 200
    plan = plan_as_json(study, configuration, (), planned)
    assert [run["from"] for run in plan["runs"] if run["arm"] == "B3"] == [f"A3.seed{seed}" for seed in range(10)]
