"""`t5x cache` against the rows that a run caches by itself: the same files, byte for byte, however they are made."""

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tasks
from codellm_jax import cli
from codellm_jax.mixture import rows, shards
from codellm_jax.mixture.mixture import Mixture, open_mixture
from codellm_jax.mixture.places import cache_place
from codellm_jax.mixture.rows import cached_rows
from codellm_jax.training.cache import cache
from codellm_jax.vocabulary import load_vocabulary

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 3  # so that few documents fill several files of 4,096 rows
with_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed: pip install '.[beam]'")
ONE = ["--direct_num_workers=1", "--direct_running_mode=in_memory"]
THREE = ["--direct_num_workers=3", "--direct_running_mode=multi_processing"]


MODULE = """
import seqio
seqio.TaskRegistry.add(
    "code.of_a_module", source=seqio.TextLineDataSource({{"train": "{file}", "validation": "{file}"}}),
    preprocessors=[lambda lines: lines.map(lambda line: {{"targets": line}}), seqio.preprocessors.tokenize,
                   lambda examples: examples.take(25), seqio.preprocessors.append_eos],
    output_features={{"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True)}}, metric_fns=[])
"""


def silent(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Iterator[dict[str, dict[str, Any]]]:
    """Documents in five files, one without any and some with broken records, and instructions in three; and what cannot
    be divided: a sample, another name of a task, and a task of another module with preprocessors of its own.
    """
    folder, dice = tmp_path_factory.mktemp("data"), random.Random(3)
    (folder / "tasks_of_a_test.py").write_text(MODULE.format(file=folder / "0.jsonl"))
    for number in range(5):
        words = ["token", "row", "déjà", "vu", "x = 1\n"]
        documents = [" ".join(dice.choice(words) for _ in range(dice.randrange(1, 900)))
                     for _ in range(0 if number == 2 else 30)]
        lines = [json.dumps({"text": document}) for document in documents]
        if number in (1, 3):
            lines += ["{broken", '{"other": 1}', ""]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    for number in range(3):
        (folder / f"asked{number}.json").write_text(json.dumps([
            {"input": "Say it." * dice.randrange(1, 9), "target": f"It {dice.randrange(99)}. " * dice.randrange(0, 9)}
            for _ in range(400)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))  # for workers
        yield {"text.many": {"json_lines": str(folder / "*.jsonl"), "holdout": 0.05},
               "text.asked": {"instructions": str(folder / "asked*.json"), "holdout": 0.05},
               "code.alias": {"task": "text.many"},
               "code.sampled": {"instructions": str(folder / "asked*.json"), "sample": 500, "holdout": 0.05}}


def mixture_of(corpora, stage: str, cache_dir: Path) -> Mixture:
    names = {"tuning": ["text.asked", "code.sampled"], "pretraining": ["text.many", "code.alias", "code.of_a_module"]}
    names = [name for name in names[stage] if name in corpora or len(corpora) > 1]
    return Mixture(names, tasks.Definitions(("tasks.pretraining", "tasks.tuning", "tasks_of_a_test"), corpora),
                   {"targets": 13 if stage == "tuning" else LENGTH}, 0.0, cache_dir=str(cache_dir), stage=stage)


@pytest.fixture(scope="module")
def unasked(corpora, tmp_path_factory) -> Path:
    """The caches of both stages as runs write them."""
    folder = tmp_path_factory.mktemp("unasked")
    for stage in ("pretraining", "tuning"):
        open_mixture(mixture_of(corpora, stage, folder), load_vocabulary(), 0, 100, report=silent)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted((folder / "rows").rglob("*")) if path.is_file()}


@pytest.fixture
def small(monkeypatch) -> None:
    """Parts so small that there are many, each in one process's hands."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "ROWS_A_PIECE", 4096)
    monkeypatch.setattr(shards, "NUMBERS_AT_ONCE", 5000)


def test_the_data_has_what_it_is_to_show(corpora, unasked):
    files = content(unasked)
    folder = Path(corpora["text.many"]["json_lines"]).parent
    assert len([name for name in files if "/text.many/" in f"/{name}" and "/train/c/" in name]) >= 5
    [recorded] = [json.loads(text) for name, text in files.items() if "text.many" in name and "cache.json" in name]
    assert recorded["splits"]["train"]["notes"] == [
        f"text.many, read for train: 120 records are documents, skipped: 2 broken JSON (first: {folder}/1.jsonl, "
        f"line 31), 1 empty file (first: {folder}/2.jsonl), 2 without text in field 'text' (first: {folder}/1.jsonl, "
        "line 32, whose fields are 'other')."]
    [recorded] = [json.loads(text) for name, text in files.items() if "text.asked" in name and "cache.json" in name]
    assert recorded["splits"]["train"]["cut"] and recorded["splits"]["train"]["left_out"]
    assert recorded["splits"]["train"]["notes"]


@with_beam
@pytest.mark.parametrize("runner, options", [
    ("DirectRunner", ONE), ("DirectRunner", THREE), ("BundleBasedDirectRunner", []),
    ("DirectRunner", [*ONE, "--direct_runner_bundle_repeat=1"])])
def test_rows_are_those_of_a_run_whatever_the_runner_and_workers(corpora, unasked, tmp_path, small, runner, options):
    for stage in ("pretraining", "tuning")[: 1 if options == THREE else 2]:  # each starts processes, which takes long
        cache(mixture_of(corpora, stage, tmp_path), load_vocabulary(), runner, options, silent)
    found, expected = content(tmp_path), content(unasked)
    assert found == {name: text for name, text in expected.items() if name in found}
    assert len(found) == len(expected) or options == THREE and len(found) > 10


def mixture_of_both(corpora, cache_dir: Path, names: tuple[str, ...] = ()) -> Mixture:
    """Documents and instructions among them: records and conversations, divisible and not, and an alias."""
    folder = Path(corpora["text.asked"]["instructions"]).parent / "chat"
    folder.mkdir(exist_ok=True)
    chat = [{"messages": [{"role": role, "content": f"{number} {role} " * (1 + number % 7)} for role in (
        "user", "assistant", "user", "assistant")]} for number in range(300)]
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("\n".join(map(json.dumps, chat[number::3])))
    both = {name: corpora[name] for name in ("text.many", "text.asked", "code.sampled")} | {
        "text.chat": {"instructions": str(folder / "*.jsonl"), "holdout": 0.05, "loss": "answers"},
        "code.answers": {"task": "text.asked", "loss": "answers"}}
    return Mixture(list(names or both), tasks.Definitions(("tasks.pretraining", "tasks.tuning"), both), {"targets": 13},
                   0.5, cache_dir=str(cache_dir))


def test_instructions_among_documents_are_those_of_a_run_by_shards(corpora, tmp_path, small):
    """What workers do, without Beam."""
    mixture = mixture_of_both(corpora, tmp_path / "asked", ("text.chat",))
    place = cache_place("text.chat", mixture.definitions, load_vocabulary(), 13, mixture.cache_dir, "pretraining")
    build = shards.Build("text.chat", mixture.definitions, load_vocabulary(), 13, "pretraining", place)
    planned = shards.plan(build)
    assert len([shard for shard in planned if shard.split == "train"]) == 3
    for shard in reversed(planned):
        shards.tokenize(build, shard)
    pieces = shards.pieces(build, planned)
    for piece in pieces:
        shards.cut(build, piece)
    shards.finish(build, planned, pieces)
    alone = cached_rows("text.chat", mixture.definitions, load_vocabulary(), 13, str(tmp_path / "unasked"), silent)
    assert content(tmp_path / "asked") == content(tmp_path / "unasked")
    assert alone["train"].count > 1000 and alone["train"].uncounted and alone["train"].conversations


@with_beam
def test_instructions_among_documents_are_those_of_a_run(corpora, tmp_path, small):
    cache(mixture_of_both(corpora, tmp_path / "asked"), load_vocabulary(), "BundleBasedDirectRunner", [], silent)
    open_mixture(mixture_of_both(corpora, tmp_path / "unasked"), load_vocabulary(), 0, 100, report=silent)
    found = content(tmp_path / "asked")
    assert found == content(tmp_path / "unasked") and len({name.split("/")[1] for name in found}) == 5


@with_beam
def test_the_hash_of_many_rows(corpora, tmp_path, monkeypatch):
    """Taken by pieces where a run takes it as it goes."""
    monkeypatch.setattr(rows, "ROWS_HASHED_WHOLE", 5000)
    for name in ("unasked", "asked"):
        mixture = mixture_of({"text.many": corpora["text.many"]}, "pretraining", tmp_path / name)
        if name == "asked":
            cache(mixture, load_vocabulary(), options=ONE, report=silent)
        open_mixture(mixture, load_vocabulary(), 0, 100, report=silent)
    assert content(tmp_path / "asked") == content(tmp_path / "unasked")


@with_beam
def test_rows_of_one_shard_each(corpora, unasked, tmp_path):
    for stage in ("pretraining", "tuning"):
        cache(mixture_of(corpora, stage, tmp_path), load_vocabulary(), options=ONE, report=silent)
    assert content(tmp_path) == content(unasked)


@with_beam
def test_a_run_finds_them_and_tokenizes_nothing(corpora, tmp_path, monkeypatch):
    mixture = mixture_of(corpora, "pretraining", tmp_path)
    cache(mixture, load_vocabulary(), options=ONE, report=silent)
    monkeypatch.setattr(rows, "_write_cache", lambda *_: pytest.fail("the rows are cached already"))
    assert open_mixture(mixture, load_vocabulary(), 0, 100).training[0].read(np.arange(3)).shape == (3, LENGTH + 1)
    told: list[str] = []
    cache(mixture, load_vocabulary(), options=ONE, report=told.append)
    assert [line.split(" in ")[0] for line in told] == [
        "text.many is already cached", "code.alias is already cached", "code.of_a_module is already cached"]
    assert not list(tmp_path.rglob("*.building"))


def build_of(corpora, cache_dir: Path) -> shards.Build:
    mixture = mixture_of(corpora, "pretraining", cache_dir)
    place = cache_place("text.many", mixture.definitions, load_vocabulary(), LENGTH, mixture.cache_dir, "pretraining")
    return shards.Build("text.many", mixture.definitions, load_vocabulary(), LENGTH, "pretraining", place)


def test_shards_and_pieces_in_any_order_and_twice(corpora, unasked, tmp_path, small):
    """What workers do, without Beam."""
    build, dice = build_of(corpora, tmp_path), random.Random(5)
    planned = shards.plan(build)
    assert [(shard.split, shard.number, len(shard.files)) for shard in planned] == [
        (split, number, 2 if number == 2 else 1) for split in ("train", "validation", "test") for number in range(4)]
    for shard in dice.sample(planned * 2, 2 * len(planned)):
        shards.do([build], shards.as_text(0, shard))
    assert shards.progress(build, planned).shards == len(planned) == len(shards.plan(build))
    pieces = shards.pieces(build, planned)
    assert max(len(piece.spans) for piece in pieces) > 1 and len(pieces) > 6
    for piece in dice.sample(pieces * 2, 2 * len(pieces)):
        shards.do([build], shards.as_text(0, piece))
    shards.finish(build, planned, pieces)
    assert content(tmp_path) == {name: text for name, text in content(unasked).items() if "/text.many/" in name}


def test_what_does_not_come_back_is_noted_alike_by_shards(corpora, other_vocabularies, tmp_path, small):
    t5 = load_vocabulary(other_vocabularies["t5"])
    for name in ("unasked", "asked"):
        defined = mixture_of(corpora, "pretraining", tmp_path).definitions
        place = cache_place("text.many", defined, t5, LENGTH, str(tmp_path / name), "pretraining")
        build = shards.Build("text.many", defined, t5, LENGTH, "pretraining", place)
        planned = shards.plan(build) if name == "asked" else []
        for shard in planned:
            shards.tokenize(build, shard)
        pieces = shards.pieces(build, planned)
        for piece in pieces:
            shards.cut(build, piece)
        if planned:
            shards.finish(build, planned, pieces)
        found = cached_rows("text.many", defined, t5, LENGTH, str(tmp_path / name), silent)
    assert "of 64 documents checked are changed by encoding" in found["train"].notes[-1]
    assert content(tmp_path / "asked") == content(tmp_path / "unasked")


def test_rows_of_a_published_tokenizer_are_the_same_by_shards(corpora, beginning_tokenizer, tmp_path, small):
    """Workers have a copy of its file alone, under another name."""
    own = load_vocabulary(beginning_tokenizer)
    defined = mixture_of(corpora, "pretraining", tmp_path).definitions
    place = cache_place("text.many", defined, own, LENGTH, str(tmp_path / "asked"), "pretraining")
    build = shards.Build("text.many", defined, own, LENGTH, "pretraining", place)
    planned = shards.plan(build)
    for shard in planned:
        shards.tokenize(build, shard)
    pieces = shards.pieces(build, planned)
    for piece in pieces:
        shards.cut(build, piece)
    shards.finish(build, planned, pieces)
    by_shards = cached_rows("text.many", defined, own, LENGTH, str(tmp_path / "asked"), silent)
    alone = cached_rows("text.many", defined, own, LENGTH, str(tmp_path / "unasked"), silent)
    assert content(tmp_path / "asked") == content(tmp_path / "unasked")
    assert by_shards["train"].read(np.arange(1))[0, 0] == own.begin_ids[0] == 0
    plain = cache_place("text.many", defined, load_vocabulary(), LENGTH, "c", "pretraining").key
    assert "begin_ids" not in plain and place.key["begin_ids"] == (0,)
    assert alone["train"].tokens > alone["train"].documents


def test_two_that_do_the_same_are_both_right(corpora, unasked, tmp_path, small, monkeypatch):
    """As when a worker is given up and its work done by another, while it lives on."""
    build = build_of(corpora, tmp_path)
    planned = shards.plan(build)
    for shard in planned:
        shards.tokenize(build, shard)
    facts = build.working / "tokens" / "train" / "000003.json"
    first = json.loads(facts.read_text())
    facts.unlink()
    shards.tokenize(build, planned[3])
    second = json.loads(facts.read_text())
    assert first["array"] != second["array"] and first["numbers"] == second["numbers"]
    pieces = shards.pieces(build, planned)
    for piece in pieces:
        shards.cut(build, piece)
    shards.cut(build, pieces[0]._replace(number=99))
    shards.finish(build, planned, pieces)
    assert content(tmp_path) == {name: text for name, text in content(unasked).items() if "/text.many/" in name}


def files_of(folder: Path, name: str) -> int:
    return len(list(folder.rglob(f"*.building/tokens/*/{name}")))


@with_beam
def test_killed_half_way_it_goes_on(corpora, unasked, tmp_path):
    """SIGKILL of the command; its workers are left to themselves."""
    slow = ("import sys, time\nfrom codellm_jax.mixture import shards\nfrom codellm_jax import cli\n"
            "shards.SHARD_BYTES, real = 1, shards.tokenize\n"
            "shards.tokenize = lambda *given: (time.sleep(0.2), real(*given))\n"
            "sys.exit(cli.main(sys.argv[1:]))\n")
    flags = ["cache", "--gin_file=gin/mixed_pretrain.gin", f"--gin.CORPORA={ {'text.many': corpora['text.many']} }",
             "--gin.MIXTURE_OR_TASK_NAME=['text.many']", f"--gin.TASK_FEATURE_LENGTHS={ {'targets': LENGTH} }",
             f"--gin.CACHE_DIR={tmp_path}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", slow, *flags, "--", *ONE], cwd=ROOT, env=environment,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as killed:
        until = time.monotonic() + 120
        while files_of(tmp_path, "0*.json") < 4 and time.monotonic() < until and killed.poll() is None:
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
    done = files_of(tmp_path, "0*.json")
    assert 4 <= done < 12 and not list(tmp_path.rglob("cache.json"))
    again = subprocess.run([sys.executable, "-m", "codellm_jax.cli", *flags, "--", *ONE], cwd=ROOT, env=environment,
                           capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr
    assert f"{done} of 12 shards are already tokenized; continuing." in again.stdout
    assert content(tmp_path) == {name: text for name, text in content(unasked).items() if "/text.many/" in name}


@with_beam
def test_killed_while_cutting_it_goes_on(corpora, unasked, tmp_path, small, monkeypatch):
    real, cut = shards.cut, []

    def dies(build, piece):
        if len(cut) == 3:
            raise OSError(28, "No space left on device")
        real(build, piece)
        cut.append(piece)

    mixture = mixture_of({"text.many": corpora["text.many"]}, "pretraining", tmp_path)
    monkeypatch.setattr(shards, "cut", dies)
    with pytest.raises(OSError, match=r"Rows cannot be cached in .*: No space left on device\. Fix this or set"):
        cache(mixture, load_vocabulary(), options=ONE, report=silent)
    monkeypatch.setattr(shards, "cut", lambda build, piece: (cut.append(piece), real(build, piece)))
    monkeypatch.setattr(shards, "tokenize", lambda *_: pytest.fail("all is tokenized"))
    cache(mixture, load_vocabulary(), options=ONE, report=silent)
    assert len({piece[:2] for piece in cut}) == len(cut) > 6
    expected = content(unasked)
    found = content(tmp_path)
    assert len(found) > 10 and found == {name: text for name, text in expected.items() if name in found}


@with_beam
@pytest.mark.parametrize("options", [ONE, ["--direct_num_workers=2", *THREE[1:]]])
def test_what_a_worker_cannot_read_is_told_in_a_line(tmp_path, options):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a b c d e f g"}\n')
    defined = tasks.Definitions(corpora={"text.gone": {"json_lines": str(tmp_path / "*.jsonl"), "holdout": 0}})
    mixture = Mixture(["text.gone"], defined, {"targets": LENGTH}, 0.0, cache_dir=str(tmp_path))
    real = shards.plan

    def plan_and_remove(build):
        planned = real(build)
        file.unlink(missing_ok=True)
        return planned * 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "plan", plan_and_remove)
        with pytest.raises(OSError) as raised:
            cache(mixture, load_vocabulary(), options=options, report=silent)
    assert "No such file or directory" in str(raised.value) and "a.jsonl" in str(raised.value)
    assert "\n" not in str(raised.value)


@with_beam
def test_broken_files_are_counted_and_nothing_left_is_an_error(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"\x1f\x8bnot gzip at all")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{\n{\n')
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n')
    defined = tasks.Definitions(corpora={"text.bad": {"json_lines": f"{tmp_path}/*.jsonl*", "holdout": 0}})
    mixture = Mixture(["text.bad"], defined, {"targets": 9}, 0.0, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"its training split has \d tokens, fewer than the 10 of one row.*\(.*1 "
                       r"records are documents, skipped: 2 broken JSON .first: .*b.jsonl, line 2., 1 broken rest "
                       r"of a.jsonl.gz, 1 empty .first: .*b.jsonl, line 1.\.\)"):
        cache(mixture, load_vocabulary(), options=ONE, report=silent)


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    start = f"import sys\n{code}\nfrom codellm_jax import cli\nsys.exit(cli.main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", start, "cache", *arguments], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_missing_beam_is_told_in_a_line(tiny_flags):
    told = run(*tiny_flags, code="sys.modules['apache_beam'] = None")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr == ("t5x cache: error: t5x cache needs Apache Beam, which is not installed: pip install "
                           "'.[beam]'. Without it, t5x train writes the same rows with one process.\n")


@with_beam
@pytest.mark.parametrize("flags, said", [
    (["--runner=DataflowRunner"], "Dataflow's workers do not see this machine's disk: set CACHE_DIR to gs://, not "),
    (["--runner=DataflowRunner", "--gin.CACHE_DIR=gs://no-such-bucket/rows"], "has files on this machine's disk, /"),
    (["--runner=DirctRunner"], "--runner=DirctRunner is not a Beam runner; these are: ")])
def test_mistakes_are_told_in_a_line(flags, said, tiny_flags, tmp_path, capsys):
    assert cli.main(["cache", *tiny_flags, f"--gin.CACHE_DIR={tmp_path}", *flags]) == 1
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


@with_beam
def test_only_one_builds_in_a_directory(corpora, tmp_path):
    build = build_of(corpora, tmp_path)
    from codellm_jax.runtime.process import alone_in

    with alone_in(str(build.working)), pytest.raises(ValueError, match="Another process is caching rows in .*building"):
        cache(mixture_of(corpora, "pretraining", tmp_path), load_vocabulary(), options=ONE, report=silent)


def test_a_large_corpus_is_pointed_here(corpora, tmp_path, monkeypatch):
    told: list[str] = []
    mixture = mixture_of(corpora, "pretraining", tmp_path)
    monkeypatch.setattr(rows, "LARGE", 1000)
    cached_rows("text.many", mixture.definitions, load_vocabulary(), LENGTH, str(tmp_path), told.append)
    assert told[0].startswith("text.many has files of 0.0 GiB. `t5x cache` with the same gin files and flags")


@with_beam
def test_progress_is_told(corpora, tmp_path, capsys, small, monkeypatch):
    monkeypatch.setattr("codellm_jax.training.cache.SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr("codellm_jax.runtime.progress.StatusLine.SECONDS_BETWEEN_LINES", 0.0)
    cache(mixture_of({"text.many": corpora["text.many"]}, "pretraining", tmp_path), load_vocabulary(), options=ONE,
          report=silent)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("shard ")]
    assert lines[0] == "shard 0/12 0.0 MB of text" and lines[-1].startswith("shard 12/12 ")
    assert any("MB/s per core" in line and " left" in line for line in lines)
