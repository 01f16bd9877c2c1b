"""`t5x prepare`: its counts counted again, the same bytes however it is done, and what is refused."""

import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from codellm_jax import cli
from codellm_jax.prepare import keys, parts, prepare, reduction
from codellm_jax.vocabulary import load_vocabulary
from tasks.benchmarks.judging import Benchmarks
from tasks.corpora import pieces, sources
from tasks.corpora.inputs import Inputs

ROOT = Path(__file__).resolve().parents[2]
with_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed: pip install '.[beam]'")
STEPS: list[Any] = [
    "special_symbols", "repeated_paragraphs", {"name": "minimum_length", "characters": 40}, "mask_e_mails",
    "exact_duplicates", {"name": "near_duplicates", "sources": ["text"]}, "title_only", "decontaminate",
    {"name": "sample", "budgets": {"text.web": 60_000}}]


def silent(line: str) -> None:
    del line


def written(path: Path, texts: list[Any]) -> None:
    path.write_text("".join(json.dumps({"text": text} if isinstance(text, str) else text) + "\n" for text in texts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two corpora with planted duplicates within and across, an address, short texts, broken lines and a question."""
    dice = random.Random(5)
    texts = [" ".join(f"word{dice.randrange(3000)}" for _ in range(dice.randrange(60, 200))) + "." for _ in range(120)]
    near = [text.replace("word1", "other1", 1) for text in texts[:10]]
    asked = Benchmarks().texts("logic").parts
    question = " ".join(next(iter(asked.values())))
    address = f"Write to me@example.org. {texts[99]}"
    written(tmp_path / "a.jsonl", [*texts[:60], *near, "short", texts[3].upper(), address])
    written(tmp_path / "b.jsonl", [*texts[60:], texts[61], f"See here: {question} And more of it stands here."])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{broken\n{"text": ""}\n')
    written(tmp_path / "c.jsonl", [{"text": texts[5], "license": "mit"},
                                {"text": "x = 1  # " + "y" * 50, "license": "mit"}])
    return tmp_path


def preparation(folder: Path, name: str = "out", steps: list[Any] | None = None, **options: Any) -> prepare.Preparation:
    corpora = {"text.web": {"json_lines": [str(folder / "a.jsonl"), str(folder / "b.jsonl")]},
               "code.own": {"json_lines": str(folder / "c.jsonl")}}
    return prepare.Preparation(Inputs(corpora), STEPS if steps is None else steps, str(folder / name), Benchmarks(),
                               ["logic"], part_bytes=options.pop("part_bytes", 1), **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_each_document_is_left_or_removed_and_all_are_counted(folder: Path, draws: None):
    vocabulary = load_vocabulary()
    prepare.prepare(preparation(folder, vocabulary=vocabulary), 1, report=silent)
    out = folder / "out"
    left, removed = rows(out), rows(out / "removed")
    read = {(row["file"], row["row"]) for row in left + removed}
    lines = {(str(folder / name), number) for name in ("a.jsonl", "b.jsonl", "c.jsonl")
             for number in range(1, len((folder / name).read_text().splitlines()) + 1)}
    assert read == lines and len(left) + len(removed) == len(lines)
    manifest = json.loads((out / "manifest.json").read_text())
    steps, sources = manifest["counts"]["steps"], manifest["counts"]["sources"]
    assert [step["name"] for step in steps] == [step if isinstance(step, str) else step["name"] for step in STEPS]
    by_step = Counter((row["step"], row["source"]) for row in removed)
    for step in steps:
        for source, one in step["sources"].items():
            assert one["removed"] == by_step[step["name"], source] == sum(one["reasons"].values())
            assert one["removed_bytes"] == sum(
                row["bytes"] for row in removed if (row["step"], row["source"]) == (step["name"], source))
            assert one["removed_tokens"] == sum(
                row["tokens"] for row in removed if (row["step"], row["source"]) == (step["name"], source))
            assert one["changed"] >= sum(step["name"] in row["changed_by"] for row in left if row["source"] == source)
    for source, one in sources.items():
        mine = [row for row in left if row["source"] == source]
        assert one["left"]["documents"] == len(mine) == one["documents"] - sum(
            step["sources"].get(source, {"removed": 0})["removed"] for step in steps)
        assert one["left"]["bytes"] == sum(len(row["text"].encode()) for row in mine)
        assert all(row["tokens"] == len(vocabulary.encode(row["text"])) + 1 for row in mine)
        assert one["left"]["tokens"] == sum(row["tokens"] for row in mine) == one["tokens"] - sum(
            step["sources"].get(source, {"removed_tokens": 0, "tokens_dropped": 0})[key]
            for step in steps for key in ("removed_tokens", "tokens_dropped"))
        assert sum(one["left"]["characters"].values()) == sum(one["left"]["chinese"].values()) == len(mine)
    assert sources["text.web"]["lost"] == Counter(row["reason"] for row in removed if row["step"] == "reading")
    for one in manifest["outputs"]:
        assert hashlib.sha256((out / one["file"]).read_bytes()).hexdigest() == one["sha256"]
    assert [file[0] for one in manifest["inputs"] for file in one["files"]] == [
        str(folder / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    # What each of them was when it was read.
    for row in left:
        text = json.loads(Path(row["file"]).read_text().splitlines()[row["row"] - 1])["text"]
        assert hashlib.sha256(text.encode()).hexdigest() == row["sha256"] and row["bytes_read"] == len(text.encode())
    assert not (folder / "out.building").exists()
    assert (out / "steps.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_planted_is_found(folder: Path):
    steps = [step for step in STEPS if not (isinstance(step, dict) and step["name"] == "sample")]
    prepare.prepare(preparation(folder, steps=steps), 1, report=silent)
    out = folder / "out"
    left, removed = rows(out), rows(out / "removed")
    by_step = {name: [row for row in removed if row["step"] == name] for name in {row["step"] for row in removed}}
    assert {name: len(found) for name, found in by_step.items()} == {
        "reading": 2, "minimum_length": 1, "exact_duplicates": 3, "near_duplicates": 11, "decontaminate": 1}
    assert not any("@example.org" in row["text"] for row in left)
    # text[5] is in both corpora: one of them goes, and the other is told.
    assert Counter(row["copy_source"] for row in by_step["exact_duplicates"])["text.web"] >= 2
    known = {row["sha256"][:16] for row in left + removed if row["sha256"]}
    assert all(row["copy_sha256"] in known for row in by_step["exact_duplicates"] + by_step["near_duplicates"])
    assert all(0.7 <= row["similarity"] <= 1 for row in by_step["near_duplicates"])
    assert by_step["decontaminate"][0]["reason"] == "holds a question of logic_sample"
    card = (out / "README.md").read_text()
    assert "| logic_sample |" in card and "holds a question of logic" in card and "Jaccard" in card


@pytest.mark.parametrize("form", [
    "parquet", pytest.param("array_record", marks=pytest.mark.slow), pytest.param("tfrecord", marks=pytest.mark.slow)])
def test_the_same_bytes_in_any_order_and_after_kills(folder: Path, monkeypatch, form: str, draws: None):
    monkeypatch.setattr(keys, "DOCUMENTS_AT_ONCE", 7)
    monkeypatch.setattr(keys, "BYTES_A_FILE", 3000)
    prepare.prepare(preparation(folder, format=form), 1, report=silent)
    wanted = contents(folder / "out")
    (folder / "out").rename(folder / "first")

    real, dice, done = prepare.do, random.Random(2), Counter[str]()

    def killed(job, text: str) -> None:
        real(job, text)
        done[text] += 1
        if dice.random() < 0.2:
            raise KeyboardInterrupt

    def in_another_order(job, todo) -> None:
        for text in dice.sample(todo, len(todo)):
            killed(job, text)

    monkeypatch.setattr(prepare, "_worker", lambda *_: in_another_order)
    for _ in range(100):
        try:
            prepare.prepare(preparation(folder, format=form), 1, report=silent)
            break
        except KeyboardInterrupt:
            pass
    assert contents(folder / "out") == wanted
    assert max(done[text] for text in done if text.startswith('["part"')) == 1


def test_large_files_are_shared_out_in_pieces(folder: Path, monkeypatch):
    corpora = {"text.web": {"json_lines": str(folder / "[ab].jsonl")},
               "text.table": {"parquet": str(folder / "table.parquet")}}
    pq.write_table(pa.table({"text": [f"Row {number} " + "of a table " * 9 for number in range(500)]}),
                   folder / "table.parquet", row_group_size=50)

    def prepared(name: str, part_bytes: int) -> Path:
        steps = ["exact_duplicates", "near_duplicates", {"name": "sample", "budgets": {"text.web": 60_000}}]
        prepare.prepare(prepare.Preparation(Inputs(corpora), steps, str(folder / name), part_bytes=part_bytes), 1,
                        report=silent)
        return folder / name

    whole = prepared("whole", 10**9)
    monkeypatch.setattr(pieces, "LEAST", 5000)
    parted = prepared("parted", 5000)
    assert len(list(whole.glob("*.parquet"))) == 2 and len(list(parted.glob("*.parquet"))) > 12
    assert rows(parted) == rows(whole)

    def removed(folder: Path) -> list[str]:
        return sorted(json.dumps(row, sort_keys=True) for row in rows(folder / "removed"))

    assert removed(parted) == removed(whole)


def test_a_kill_within_a_part_leaves_nothing_half(folder: Path, monkeypatch):
    prepare.prepare(preparation(folder, "other"), 1, report=silent)
    real = reduction.finish

    def killed(*arguments) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(reduction, "finish", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(preparation(folder), 1, report=silent)
    monkeypatch.setattr(reduction, "finish", real)
    real_add, number = parts.Table.add, [0]

    def fails(self, *arguments) -> None:
        number[0] += 1
        if number[0] == 20:
            raise OSError("No space left on device")
        real_add(self, *arguments)

    monkeypatch.setattr(parts.Table, "add", fails)
    with pytest.raises(OSError, match="No space"):
        prepare.prepare(preparation(folder), 1, report=silent)
    prepare.prepare(preparation(folder), 1, report=silent)
    assert contents(folder / "out") == contents(folder / "other")


def test_many_pairs_are_joined_by_rounds_of_workers(folder: Path, monkeypatch):
    dice = random.Random(8)
    texts = [[f"word{dice.randrange(3000)}" for _ in range(150)] for _ in range(30)]
    for text in texts[:]:
        for _ in range(dice.randrange(5)):  # copies of copies, so that they are chains
            text = [word if dice.random() > 0.01 else "other" for word in text] + ["end"]
            texts.append(text)
    written(folder / "a.jsonl", [" ".join(text) for text in texts])
    prepare.prepare(preparation(folder, "once", ["near_duplicates"]), 1, report=silent)
    monkeypatch.setattr(reduction, "BYTES_A_BUCKET", 1000)
    real, done = prepare.do, Counter[str]()

    def counted(job, text: str) -> None:
        real(job, text)
        done[json.loads(text)[0]] += 1

    monkeypatch.setattr(prepare, "do", counted)
    prepare.prepare(preparation(folder, "out", ["near_duplicates"]), 1, report=silent)
    assert done["star"] > 20 and done["joined"] > 3
    assert contents(folder / "out") == contents(folder / "once")
    assert sum(row["step"] == "near_duplicates" for row in rows(folder / "out" / "removed")) > 40


def test_which_copy_stays_depends_on_the_texts_alone(folder: Path):
    steps = ["exact_duplicates", "near_duplicates", {"name": "duplicated_paragraphs", "characters": 30},
             {"name": "sample", "budgets": {"text.web": 30_000}}]
    prepare.prepare(preparation(folder, steps=steps), 1, report=silent)
    wanted = sorted(row["text"] for row in rows(folder / "out"))
    texts = [line for name in ("b.jsonl", "a.jsonl") for line in (folder / name).read_text().splitlines()]
    random.Random(1).shuffle(texts)
    (folder / "a.jsonl").write_text("\n".join(texts[:9]))
    (folder / "b.jsonl").write_text("\n".join(texts[9:]))
    prepare.prepare(preparation(folder, "again", steps, part_bytes=10**9), 1, report=silent)
    assert sorted(row["text"] for row in rows(folder / "again")) == wanted


def test_paragraphs_stay_once(tmp_path: Path):
    notice = "This notice stands at the end of every page of this site, and nobody reads it."
    pages = [f"Page {number} has words of its own, which are {number * number} in all.\n{notice}\nnear"
             for number in range(9)]
    written(tmp_path / "a.jsonl", [*pages, f"{notice}\n{notice}"])
    inputs = Inputs({"text.a": {"json_lines": str(tmp_path / "a.jsonl")}})
    prepare.prepare(prepare.Preparation(inputs, ["duplicated_paragraphs"], str(tmp_path / "out")), 1, report=silent)
    left = rows(tmp_path / "out")
    assert sum(notice in row["text"] for row in left) == 1
    assert sum(row["changed_by"] == ["duplicated_paragraphs"] for row in left) >= 8
    assert all("near" in row["text"] or notice in row["text"] for row in left)


def test_a_budget_is_kept_and_drawn_by_the_text(folder: Path):
    def texts(budget: int, seed: int = 0) -> set[str]:
        name = f"out{budget}_{seed}"
        steps = ["exact_duplicates", {"name": "sample", "budgets": {"text.web": budget}, "seed": seed}]
        prepare.prepare(preparation(folder, name, steps), 1, report=silent)
        return {row["text"] for row in rows(folder / name) if row["source"] == "text.web"}

    small, large, whole = texts(20_000), texts(40_000), texts(10**9)
    assert small < large < whole and texts(20_000, seed=1) != small
    longest = max(len(text.encode()) for text in whole)
    assert 20_000 - longest < sum(len(text.encode()) for text in small) <= 20_000


def test_a_budget_of_tokens_is_that_of_its_vocabulary(folder: Path):
    steps = ["exact_duplicates", {"name": "sample", "budgets": {"text.web": 9000}, "unit": "tokens"}]
    vocabulary = load_vocabulary()
    prepare.prepare(preparation(folder, steps=steps, vocabulary=vocabulary), 1, report=silent)
    counted = [len(vocabulary.encode(row["text"])) + 1 for row in rows(folder / "out") if row["source"] == "text.web"]
    assert 9000 - 1500 < sum(counted) <= 9000
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["vocabulary_sha256"] == vocabulary.content_hash
    assert vocabulary.content_hash[:16] in (folder / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="set VOCABULARY"):
        prepare.prepare(preparation(folder, "none", steps), 1, report=silent)
    with pytest.raises(ValueError, match="from different STEPS"):
        prepare.prepare(preparation(folder, steps=["exact_duplicates", steps[1] | {"unit": "bytes"}]), 1, report=silent)


def test_what_is_prepared_is_a_corpus_again(folder: Path):
    """Its Parquet files are read by CORPORA, for training and for another preparation, licence and all."""
    prepare.prepare(preparation(folder), 1, report=silent)
    left = rows(folder / "out")
    spec = {"parquet": str(folder / "out" / "*.parquet"), "holdout": 0}
    assert list(sources.documents(spec, "train")) == [row["text"] for row in left]
    again = prepare.Preparation(Inputs({"text.again": spec}), [], str(folder / "again"))
    prepare.prepare(again, 1, report=silent)
    found = rows(folder / "again")
    assert [(row["text"], row["license"]) for row in found] == [(row["text"], row["license"]) for row in left]
    assert "mit" in {row["license"] for row in found}
    assert [row["row"] for row in found[:2]] == [1, 2] and found[0]["file"].endswith("documents-00000-of-00003.parquet")


@pytest.mark.parametrize(("form", "kind"), [("tfrecord", "tfrecords"), ("array_record", "array_record")])
def test_what_tfds_opens(folder: Path, form: str, kind: str):
    import tensorflow_datasets as tfds

    prepare.prepare(preparation(folder, "parquet"), 1, report=silent)
    prepare.prepare(preparation(folder, format=form), 1, report=silent)
    left, out = rows(folder / "parquet"), folder / "out"
    made = tfds.builder_from_directory(out)
    assert made.info.splits["train"].num_examples == len(left)
    read = list(tfds.as_numpy(made.as_dataset("train")) if form == "tfrecord" else made.as_data_source("train"))

    def plain(value: Any) -> Any:
        return value.decode() if isinstance(value, bytes) else [each.decode() for each in value] if isinstance(
            value, np.ndarray | list) else int(value)

    assert [{key: plain(value) for key, value in row.items()} for row in read] == [
        {key: value or "" if key in ("license", "language") else value for key, value in row.items()
         if key != "tokens"} for row in left]
    assert sorted(made.info.features) == sorted(key for key in left[0] if key != "tokens")
    spec = {kind: str(out / f"*.{form}-*"), "holdout": 0, "where": {"source": "text.web"}}
    assert list(sources.documents(spec, "train")) == [row["text"] for row in left if row["source"] == "text.web"]
    assert sources.describe(spec)["prepared"][0]["folder"] == str(out)
    again = [(each.text, each.licence) for each in Inputs({"text.a": spec}).documents(
        "text.a", sources.files(spec, "train"))]
    assert again == [(row["text"], row["license"]) if row["source"] == "text.web" else (None, None) for row in left]
    manifest = json.loads((out / "manifest.json").read_text())
    assert all(hashlib.sha256((out / one["file"]).read_bytes()).hexdigest() == one["sha256"]
               for one in manifest["outputs"])
    with pytest.raises(ValueError, match="from different FORMAT"):
        prepare.prepare(preparation(folder), 1, report=silent)


def test_a_corpus_says_how_it_was_prepared(folder: Path):
    prepare.prepare(preparation(folder), 1, report=silent)
    out = folder / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    spec = {"parquet": str(out / "*.parquet")}
    assert sources.describe(spec)["prepared"] == [{
        "folder": str(out), "steps_sha256": manifest["steps_sha256"], "inputs_sha256": manifest["inputs_sha256"],
        "inputs": {"text.web": [str(folder / "a.jsonl"), str(folder / "b.jsonl")],
                   "code.own": [str(folder / "c.jsonl")]}}]
    many = [[f"/data/{number % 2}/{number}.jsonl", 9] for number in range(30)]
    (out / "manifest.json").write_text(json.dumps(manifest | {"inputs": [
        {"source": "text.web", "spec": {}, "files": many},
        {"source": "code.python", "spec": {"python": "code"}, "files": None}]}))
    assert sources.describe(spec)["prepared"][0]["inputs"] == {
        "text.web": ["/data/0: 15 files", "/data/1: 15 files"], "code.python": ['{"python": "code"}']}
    for other in ("no JSON", '{"steps_sha256": 3}', "[]"):  # of another program
        (out / "manifest.json").write_text(other)
        assert "prepared" not in sources.describe(spec)


@pytest.mark.slow
def test_a_run_names_how_its_data_were_prepared(folder: Path):
    prepare.prepare(preparation(folder, steps=["exact_duplicates"]), 1, report=silent)
    run, corpora = folder / "run", {"text.clean": {"parquet": str(folder / "out" / "*.parquet")}}
    done = subprocess.run([
        sys.executable, "-m", "codellm_jax.cli", "train", "--gin_file=gin/text_pretrain.gin",
        "--gin_file=gin/models/tiny.gin", f"--gin.CORPORA={corpora}", "--gin.MIXTURE_OR_TASK_NAME=['text.clean']",
        "--gin.TRAIN_STEPS=2", "--gin.WARMUP_STEPS=0", "--gin.BATCH_SIZE=8",
        "--gin.TASK_FEATURE_LENGTHS={'targets': 64}", f"--gin.MODEL_DIR={run}",
        f"--gin.CACHE_DIR={folder / 'cache'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    provenance = json.loads((run / "provenance.json").read_text())
    [told] = provenance["prepared"]["text.clean"]
    assert told["steps_sha256"] == manifest["steps_sha256"] and told["inputs_sha256"] == manifest["inputs_sha256"]
    assert str(folder / "a.jsonl") in told["inputs"]["text.web"]
    assert provenance["ledger"]["prepared"] == provenance["prepared"]
    assert manifest["steps_sha256"][:12] in done.stdout


def test_where_documents_stand(tmp_path: Path):
    (tmp_path / "a, b.txt").write_text("One file is one document.")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{broken\n{"text": "fourth", "license": "mit"}\n')
    inputs = Inputs({"text.files": {"text_files": str(tmp_path / "*.txt")},
                     "text.lines": {"json_lines": str(tmp_path / "a.jsonl")}, "code.own": {"python": "code"}})
    assert [(Path(each.file).name, each.row, each.text) for each in inputs.documents("text.files", [
        str(tmp_path / "a, b.txt")])] == [("a, b.txt", 1, "One file is one document.")]
    found = list(inputs.documents("text.lines", [str(tmp_path / "a.jsonl")]))
    assert [(each.row, each.text, each.licence) for each in found] == [
        (1, "first", None), (3, None, None), (4, "fourth", "mit")]
    assert {each.file for each in found} == {str(tmp_path / "a.jsonl")}
    own = {each.file: each for each in inputs.documents("code.own", None)}
    assert own["json/decoder.py"].row == 1 and own["json/decoder.py"].language == "python"


# ---- What is refused -----------------------------------------------------------------------------


def test_again_does_nothing_and_other_settings_are_refused(folder: Path):
    prepare.prepare(preparation(folder), 1, report=silent)
    before, lines = contents(folder / "out"), []
    prepare.prepare(preparation(folder), 1, report=lines.append)
    assert contents(folder / "out") == before and lines == [f"{folder / 'out'} already holds this preparation."]
    with pytest.raises(ValueError, match="from different STEPS"):
        prepare.prepare(preparation(folder, steps=["exact_duplicates"]), 1, report=silent)
    os.utime(folder / "c.jsonl", ns=(1, 1))  # as large as before
    with pytest.raises(ValueError, match="from different contents of files of CORPORA"):
        prepare.prepare(preparation(folder), 1, report=silent)
    written(folder / "c.jsonl", ["another"])
    with pytest.raises(ValueError, match="from different files of CORPORA"):
        prepare.prepare(preparation(folder), 1, report=silent)
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"):
        prepare.prepare(preparation(folder, "mine"), 1, report=silent)
    with pytest.raises(ValueError, match="thesis.txt is a file"):
        prepare.prepare(preparation(folder, "mine/thesis.txt"), 1, report=silent)


def test_files_that_change_meanwhile_are_noticed(folder: Path, monkeypatch):
    real = prepare._run

    def changed(job, work, report) -> None:
        content = (folder / "b.jsonl").read_text()
        (folder / "b.jsonl").write_text(content.replace("word", "swor"))  # as long as before
        os.utime(folder / "b.jsonl", ns=(1, 1))
        real(job, work, report)

    monkeypatch.setattr(prepare, "_run", changed)
    with pytest.raises(ValueError, match=r"b.jsonl has changed since this preparation began"):
        prepare.prepare(preparation(folder), 1, report=silent)
    monkeypatch.setattr(prepare, "_run", real)
    with pytest.raises(ValueError, match="was started with different contents of files of CORPORA"):
        prepare.prepare(preparation(folder), 1, report=silent)


def test_work_that_another_version_began_is_refused(folder: Path, monkeypatch):
    monkeypatch.setattr(prepare, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(preparation(folder), 1, report=silent)
    plan = folder / "out.building" / "plan.json"
    plan.write_text(json.dumps({key: value for key, value in json.loads(plan.read_text()).items() if key != "layout"}))
    with pytest.raises(ValueError, match="started with different versions of this package: remove it to start again"):
        prepare.prepare(preparation(folder), 1, report=silent)


def test_parts_of_large_corpora_are_larger(folder: Path, monkeypatch):
    def parts_of(part_bytes: int | None) -> int:
        plan = prepare._plan(preparation(folder, part_bytes=part_bytes), [], [])
        return len(plan["parts"])

    assert parts_of(None) == 2 and parts_of(1) == 3  # one of each corpus; one of each file
    monkeypatch.setattr(prepare, "LEAST_PART", 1)
    monkeypatch.setattr(prepare, "MOST_PARTS", 2)
    assert parts_of(None) == 3 and parts_of(10**9) == 2


def test_records_without_a_document_are_told(folder: Path):
    lines: list[str] = []
    prepare.prepare(preparation(folder, steps=[]), 1, report=lines.append)
    assert "text.web: 2 records hold no document: 1 broken JSON, 1 empty." in lines
    (folder / "c.jsonl").write_text('{broken\n{"text": 3}\n')
    for _ in range(2):  # nor is it another time
        with pytest.raises(ValueError, match="code.own: no document is left of its records: 1 broken JSON, 1 .*"
                           r"The first is in .*/c.jsonl, line 1. .*start"):
            prepare.prepare(preparation(folder, "none", []), 1, report=silent)
    (folder / "c.jsonl").write_text("[]")
    with pytest.raises(ValueError, match="code.own: it has no records. .*start again"):
        prepare.prepare(preparation(folder, "empty", []), 1, report=silent)


def test_names_of_files(tmp_path: Path):
    name = "ä b, line 3: 名前 {x} %s\n.jsonl"
    written(tmp_path / name, ["first", "second"])
    inputs = Inputs({"text.a": {"json_lines": str(tmp_path / "*")}})
    [(file, _, _)] = inputs.files("text.a") or ()
    assert file == str(tmp_path / name)
    assert [(each.file, each.row) for each in inputs.documents("text.a", [file])] == [(file, 1), (file, 2)]
    written(tmp_path / os.fsdecode(b"\xff.jsonl"), ["third"])
    with pytest.raises(ValueError, match=r"text.a: the name of the file '.*/\\udcff.jsonl' is not UTF-8; rename it"):
        inputs.files("text.a")


@pytest.mark.parametrize(("corpora", "told"), [
    ({}, "CORPORA must map"), ({"web": {"json_lines": "a"}}, "named text.NAME"),
    ({"text.a": {"instructions": "a.json"}}, "reads documents"), ({"text.a": {"task": "x"}}, "reads documents"),
    ({"text.a": {"json_lines": "a", "validation": "b"}}, "'validation' is an option of training"),
    ({"text.a": {"python": "code", "transform": ["strip_comments"]}}, "'transform' is an option of training")])
def test_corpora_that_are_not_prepared(corpora, told: str):
    with pytest.raises(ValueError, match=told):
        Inputs(corpora)


def test_what_a_user_may_mistake_is_one_line(folder: Path, capsys):
    def said(*flags: str) -> str:
        assert cli.main(["prepare", "--gin_file=gin/prepare.gin", f"--gin.OUTPUT={folder / 'out'}", *flags]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "Traceback" not in told
        return told

    assert "no file matches" in said("--gin.CORPORA={'text.a': {'json_lines': 'nowhere/*.jsonl'}}", "--workers=1")
    assert "nearest: exact_duplicates" in said("--gin.STEPS=['exact_duplicate']", "--workers=1")
    assert "at least 1" in said("--workers=0")
    (folder / "a.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    corpus = f"--gin.CORPORA={{'text.a': {{'json_lines': '{folder}/a.parquet'}}}}"
    assert "a Parquet file" in said(corpus, "--gin.STEPS=['exact_duplicates']", "--workers=1")


# ---- Beam ----------------------------------------------------------------------------------------


@with_beam
def test_beam_gives_the_same_bytes(folder: Path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    steps = ["minimum_length", "near_duplicates", "decontaminate"]
    prepare.prepare(preparation(folder, "one", steps), 1, report=silent)
    prepare.prepare(preparation(folder, "out", steps), 3, report=silent)
    assert contents(folder / "out") == contents(folder / "one")


@with_beam
@pytest.mark.slow
def test_killed_at_random_it_goes_on(folder: Path, draws: None):
    prepare.prepare(preparation(folder, "one"), 1, report=silent)
    corpora = preparation(folder).inputs.corpora
    command = [sys.executable, "-m", "codellm_jax.cli", "prepare", "--gin_file=gin/prepare.gin", "--workers=2",
               f"--gin.OUTPUT={folder / 'out'}", f"--gin.CORPORA={corpora}", f"--gin.STEPS={STEPS}",
               "--gin.TASKS=['logic']", "--gin.prepare.part_bytes=1"]
    dice = random.Random(4)
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(dice.uniform(8, 20))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert contents(folder / "out") == contents(folder / "one")


@with_beam
def test_what_goes_wrong_in_a_worker_is_one_line(folder: Path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (folder / "c.jsonl").write_bytes(b"PAR1" + b"\0" * 100)
    with pytest.raises(ValueError, match=r"c.jsonl is a Parquet file"):
        prepare.prepare(preparation(folder), 2, report=silent)
