"""Corpora on the hub, in every form: each is read as it is from disk."""

import gzip
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import Hub, fake_hub

from codellm_jax import contents
from tasks.corpora import sources

DATA = "hf://datasets/org/data"
TEXTS = [f"text {number} é" for number in range(60)]


@pytest.fixture
def hub(tmp_path: pathlib.Path) -> Iterator[Hub]:
    folder = tmp_path / "hub" / "org" / "data"
    (folder / "parts").mkdir(parents=True)
    rows = [{"text": text, "number": number} for number, text in enumerate(TEXTS)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "parts" / "a.jsonl").write_bytes(lines[: len(lines) // 2])
    (folder / "parts" / "b.jsonl.gz").write_bytes(gzip.compress(lines[len(lines) // 2 :]))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "parts" / "a.parquet", row_group_size=9)
    with pyarrow.ipc.new_file(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    (folder / "a.csv").write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    with fake_hub(tmp_path / "hub") as served, mock.patch.dict(os.environ, served.environment(tmp_path / "cache")):
        yield served


def _read(spec: dict[str, Any]) -> list[str]:
    return list(sources.documents({**spec, "holdout": 0}, "train", "text.mine"))


def test_streams_of_tensorflow_are_read_as_files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """etils reads gs:// through TensorFlow, whose streams lack what pyarrow asks of one."""
    gfile = pytest.importorskip("tensorflow").io.gfile

    class Remote:
        def __init__(self, file: str) -> None:
            self.file = str(tmp_path / file.removeprefix("gs://bucket/"))

        def open(self, mode: str) -> Any:
            return gfile.GFile(self.file, mode)

    monkeypatch.setattr(contents, "remote", Remote)
    table = pyarrow.table({"text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "parquet", row_group_size=9)
    with pyarrow.ipc.new_file(str(tmp_path / "arrow"), table.schema) as writer:
        writer.write_table(table)
    for kind in ("parquet", "arrow"):
        spec = {kind: "gs://bucket/*", "holdout": 0}
        assert list(sources.documents(spec, "train", only_files=[f"gs://bucket/{kind}"])) == TEXTS


@pytest.mark.parametrize(("kind", "pattern", "expected"), [
    ("parquet", "parts/*.parquet", TEXTS), ("parquet", "**/*.parquet", TEXTS), ("arrow", "a.arrow", TEXTS),
    ("csv", "*.csv", TEXTS), ("json_lines", "parts/b.jsonl.gz", TEXTS[31:]),
])
def test_data_sets_of_the_hub(hub: Hub, kind: str, pattern: str, expected: list[str]) -> None:
    assert _read({kind: f"{DATA}/{pattern}"}) == expected


def test_files_are_known_by_the_commit(hub: Hub) -> None:
    spec = {"parquet": f"{DATA}/parts/*.parquet"}
    commit = hub.commit("org/data", "main")
    size = (hub.folder / "org" / "data" / "parts" / "a.parquet").stat().st_size
    assert sources.describe(spec)["train_files"] == [[f"{DATA}@{commit}/parts/a.parquet", size]]
    assert sources.describe({"parquet": f"{DATA}@{commit}/parts/*"})["train_files"][0][0].startswith(f"{DATA}@{commit}")


def test_of_parquet_only_what_is_needed_is_asked_for(hub: Hub) -> None:
    file = hub.folder / "org" / "data" / "parts" / "a.parquet"
    table = pyarrow.table({"text": TEXTS, "large": [os.urandom(500_000) for _ in TEXTS]})
    pyarrow.parquet.write_table(table, file, row_group_size=10)
    sent: list[int] = []

    def counted(self: Any, status: int, body: bytes, headers: dict[str, str], *rest: Any) -> None:
        sent.append(len(body))
        whole(self, status, body, headers, *rest)

    handler = hub.handler
    whole = handler._send
    with mock.patch.object(handler, "_send", counted):
        assert _read({"parquet": f"{DATA}/parts/a.parquet"}) == TEXTS
    assert 0 < sum(sent) < file.stat().st_size / 2


@pytest.mark.parametrize(("name", "message"), [
    ("hf://datasets/org/none/*.parquet", "has no hf://datasets/org/none, or it is private"),
    ("hf://datasets/org/data@v9/*.parquet", "hf://datasets/org/data has no revision v9"),
    ("hf://org/data/*.parquet", "names no files of a data set on the hub; give hf://datasets/ORG/NAME/FILES"),
    ("hf://datasets/org/data/*.tar", "no file matches"),
    ("hf://datasets/org/data", "is a folder|matches only folders|no file"),
])
def test_what_is_not_there_is_one_line(hub: Hub, name: str, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=f"text.mine: .*({message})") as error:
        _read({"parquet": name})
    assert "\n" not in str(error.value)


def test_a_gated_data_set_asks_for_a_token(hub: Hub) -> None:
    hub.refuse["org/data"] = (403, "GatedRepo")
    with pytest.raises(ValueError, match="text.mine: hf://datasets/org/data is gated: accept its terms on its page"):
        _read({"parquet": f"{DATA}/parts/*.parquet"})


def test_a_connection_that_breaks_off_is_taken_up_again(hub: Hub) -> None:
    hub.drop["parts/a.jsonl"] = [100]
    assert _read({"json_lines": f"{DATA}/parts/a.jsonl"}) == TEXTS[:30]


def test_a_hub_that_is_gone(hub: Hub) -> None:
    with mock.patch.dict(os.environ, {"HF_ENDPOINT": "http://127.0.0.1:9"}), pytest.raises(
            OSError, match="text.mine: .*the connection to http://127.0.0.1:9 failed") as error:
        _read({"parquet": f"{DATA}/parts/*.parquet"})
    assert "\n" not in str(error.value)
