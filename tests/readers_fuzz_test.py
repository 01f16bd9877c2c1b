"""Files of random bytes, and good ones with some bytes changed, in every reader: refused in one line, or read."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from codellm_jax.results.files import Damaged, read_provenance
from codellm_jax.runtime.progress import parsed_records

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8)
of_a_file = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@of_a_file
@given(lines=st.lists(st.binary(max_size=40) | VALUES | st.fixed_dictionaries(
    {"step": st.integers(0, 99) | VALUES, "split": st.just("train") | VALUES, "loss": VALUES}), max_size=6))
@example(lines=[{"step": None, "split": "train"}, b"[" * 100_000, b"9" * 5000, {"step": 3, "split": "eval", "loss": 1}])
def test_records(lines: list[Any]) -> None:
    content = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    records, broken = parsed_records(content)
    assert len(records) + broken <= content.count(b"\n") + 1
    for record in records:
        assert json.loads(json.dumps(record)) == record or "NaN" in json.dumps(record)
        assert isinstance(record["step"], int) and record["step"] <= 2**53 and isinstance(record["split"], str)


LEDGER = st.fixed_dictionaries({"stage": st.just("tuning"), "rows": VALUES | st.just({"text.a": 1}), "tokens": VALUES,
                                "before": st.lists(VALUES, max_size=2) | VALUES})


@of_a_file
@given(content=st.binary(max_size=60) | VALUES | st.fixed_dictionaries(
    {"ledger": LEDGER | VALUES, "step": VALUES, "sessions": st.lists(VALUES, max_size=2) | VALUES, "finished": VALUES}))
@example(content=b"[" * 100_000)
@example(content={"ledger": {"stage": "tuning", "rows": {}, "tokens": {}, "before": []}, "sessions": [], "step": 1})
def test_provenance(tmp_path: Path, content: Any) -> None:
    (tmp_path / "provenance.json").write_bytes(
        content if isinstance(content, bytes) else json.dumps(content).encode())
    try:
        found = read_provenance(epath.Path(tmp_path), ("ledger", "step", "sessions"))
    except Damaged as error:
        assert "provenance.json" in str(error) and "\n" not in str(error) and len(str(error)) < 400
    else:
        assert found and isinstance(found["step"], int) and sum(found["ledger"]["rows"].values()) >= -1e18


LINES = "".join(json.dumps({"text": f"a row of {number} tokens\nand a \u2028 line", "id": number}) + "\n"
                for number in range(9))
TABLE = "text,id\n" + "".join(f'"a row of {number} ""tokens""",{number}\n' for number in range(9))
NOTEBOOK = json.dumps({"cells": [{"cell_type": "code", "source": ["x = 1\n"]}], "nbformat": 4,
                       "metadata": {"kernelspec": {"language": "python"}}})


def tar() -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for number in range(4):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = 9
            archive.addfile(member, io.BytesIO(b"some text"))
    return whole.getvalue()


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    whole = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"a row of {number}" for number in range(20)]}), whole)
    return whole.getvalue()


def arrow() -> bytes:
    import pyarrow

    whole, table = io.BytesIO(), pyarrow.table({"text": [f"a row of {number}" for number in range(20)]})
    with pyarrow.ipc.new_file(whole, table.schema) as writer:
        writer.write_table(table)
    return whole.getvalue()


def warc() -> bytes:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    whole = io.BytesIO()
    writer = WARCWriter(whole, gzip=True)
    page = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.1")
    for number in range(3):
        writer.write_record(writer.create_warc_record(
            f"http://a/{number}", "response", payload=io.BytesIO(b"<p>a page of text</p>"), http_headers=page))
    return whole.getvalue()


FILES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "json_lines": ("a.jsonl", LINES.encode), "gzip": ("a.jsonl.gz", lambda: gzip.compress(LINES.encode())),
    "bz2": ("a.jsonl.bz2", lambda: bz2.compress(LINES.encode())),
    "xz": ("a.jsonl.xz", lambda: lzma.compress(LINES.encode())),
    "csv": ("a.csv", TABLE.encode), "text_files": ("a.txt", lambda: b"text\n" * 9),
    "webdataset": ("a.tar", tar), "parquet": ("a.parquet", parquet), "arrow": ("a.arrow", arrow),
    "warc": ("a.warc.gz", warc), "notebooks": ("a.ipynb", NOTEBOOK.encode)}


def require_refused_or_read(read: Callable[[], Iterator[Any]], most: int = 64 << 20) -> None:
    tracemalloc.start()
    try:
        for count, _ in enumerate(read()):
            assert count < 1000
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < most


def changed(content: bytes, junk: bytes, at: float, how: int) -> bytes:
    begin = int(at * len(content))
    return (junk, content[:begin], content[:begin] + junk + content[begin + len(junk):],
            content[:begin] + junk + content[begin:], content[begin:], content * 2)[how]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=20) | st.just(b"\xff\xfe"), at=st.floats(0, 1), how=st.integers(0, 5))
def test_corpora(tmp_path: Path, kind: str, junk: bytes, at: float, how: int) -> None:
    from tasks.corpora.sources import documents

    name, make = FILES[kind]
    (tmp_path / name).write_bytes(changed(make(), junk, at, how))
    own = {"gzip": "json_lines", "bz2": "json_lines", "xz": "json_lines"}.get(kind, kind)
    spec = {own: str(tmp_path / name), "holdout": 0} | ({"field": "txt"} if kind == "webdataset" else {})
    require_refused_or_read(lambda: documents(spec, "train", "text.a"))


PAIR = st.fixed_dictionaries({"input": VALUES | st.text(), "target": VALUES | st.text()})
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "x"]) | VALUES, "content": VALUES})


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(VALUES | PAIR | st.fixed_dictionaries(
    {"messages": st.lists(TURN | VALUES, max_size=4) | VALUES}), max_size=5), lines=st.booleans())
def test_instructions(tmp_path: Path, records: list[Any], lines: bool) -> None:
    from tasks.instruction_sets.instructions import pairs

    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    (tmp_path / "a.json").write_text(text)
    require_refused_or_read(lambda: pairs({"instructions": str(tmp_path / "a.json"), "holdout": 0}, "train", "text.a"))


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.binary(max_size=60) | st.fixed_dictionaries({"model": VALUES, "added_tokens": VALUES}) | VALUES)
def test_tokenizers(tmp_path: Path, value: Any) -> None:
    from codellm_jax.vocabulary import load_vocabulary

    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    for name in ("tokenizer.json", "a.model"):
        (tmp_path / name).write_bytes(content)
        require_refused_or_read(lambda name=name: iter([load_vocabulary(str(tmp_path / name))]))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["TRAIN_STEPS", "CODE_RATE", "CORPORA", "MIX_PHASES", "model.layers", "MODEL_DIR"]) |
       st.text(max_size=6),
       value=st.text(max_size=20) | VALUES.map(repr) | st.sampled_from(["@f()", "%X", "[", "'", "("]))
def test_gin_values(name: str, value: str) -> None:
    from codellm_jax.configuration import read_configuration

    require_refused_or_read(lambda: iter([read_configuration(["gin/mixed_pretrain.gin"], [(name, value)])]))
