"""Eight host devices, and tiny corpora whose rows are cached once per session."""

import getpass
import os
import tempfile

# Set before importing jax, which reads them once. With JAX_PLATFORMS=cuda only test files written for a GPU pass.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LLVM's expensive passes would triple the time of compiling, which dominates these tests.
os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 "
                           "--xla_llvm_disable_expensive_passes=true").strip()
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(), f"codellm_jax_tests_{getpass.getuser()}", "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import dataclasses  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Each run of the tests tries the same examples, so that it passes or fails by what it tests; .ci/weekly draws others.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

LENGTH = 32
FOR_TPUS = ("precompile_test", "readme_test", "attention_test", "topologies_test")
LONGEST = ("storage_test", "study_test", "processes_test", "report_test")
WORDS = ("the a row of tokens is read by its number and never lost while one model learns from text and code in turn "
         "héllo 世界 order position share ledger epoch source schedule quota").split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the slowest files first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in (*FOR_TPUS, *LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps a file's tests on one worker, for its fixtures; and all files that compile for TPUs on one worker, since
    libtpu serves one process at a time, until that process ends.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False  # else files are sorted by their number of tests

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tpu" if Path(file).stem in FOR_TPUS else file

        def remove_node(self, node: Any) -> str | None:
            """Returns the test in which a worker died, and reassigns the tests after it.

            xdist's method also reassigns that test, which kills the next worker, and finished files, for which a worker
            waits forever.
            """
            units = {scope: unit for scope, unit in self.assigned_work.pop(node).items() if not all(unit.values())}
            if not units:
                return None
            died_in = next(test for unit in units.values() for test, done in unit.items() if not done)
            for scope, unit in units.items():
                left = {test: done or test == died_in for test, done in unit.items()}
                if not all(left.values()):
                    self.workqueue[scope] = left
            for other in self.assigned_work:
                self._reschedule(other)
            return died_in

    return ByFile(config, log)


compiled: dict[tuple[Any, ...], Any] = {}  # the programs of a file's tests


def pytest_runtest_setup(item: pytest.Item) -> None:
    if "jax" in sys.modules and not compiled:
        compile_once()


def compile_once() -> None:
    """Makes a file's tests share compiled programs: `train`, which most tests call, traces its step anew at each call.

    JAX's cache on disk holds programs for one device only; see `partitioning._compile_anew`.
    """
    from jax._src import cache_key, compiler

    real = compiler.compile_or_get_cached
    if hasattr(real, "__wrapped__"):
        return

    @functools.wraps(real)
    def shared(backend: Any, module: Any, devices: Any, options: Any, host_callbacks: Any, *more: Any,
               **named: Any) -> Any:
        compile_anew = functools.partial(real, backend, module, devices, options, host_callbacks, *more, **named)
        if host_callbacks or backend.platform != "cpu":
            return compile_anew()
        key = cache_key.get(module, devices, options, backend), *(device.id for device in devices.flat)
        if key not in compiled:
            compiled[key] = compile_anew()
        return compiled[key]

    compiler.compile_or_get_cached = shared


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Drops compiled programs after each file: with all of them a worker grows to 7 GB, and each garbage collection
    takes seconds. The next file uses JAX's cache on disk until it makes a mesh.
    """
    yield
    compiled.clear()
    if "jax" in sys.modules:
        from jax.experimental.compilation_cache import compilation_cache

        sys.modules["jax"].config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
        sys.modules["jax"].clear_caches()
        gc.collect()


def _prose(dice: random.Random, words: int) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(words)) + "."


def _program(dice: random.Random, lines: int) -> str:
    body = "".join(f"    value = value * {dice.randrange(100)} + {dice.choice('abcdef')}{dice.randrange(10)}\n"
                   for _ in range(lines))
    return f"def function_{dice.randrange(1000)}(value):\n{body}    return value\n"


def write_json_lines(path: Path, documents: list[str]) -> str:
    """Writes documents as {"text": document} lines; returns the path as a corpus's pattern."""
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return str(path)


@pytest.fixture(scope="session")
def other_vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SentencePiece files with other conventions: "llama" adds a space before a text and falls back to bytes; "t5"
    merges blanks, including line ends, and knows few characters.
    """
    import io

    import sentencepiece

    dice, folder = random.Random(3), tmp_path_factory.mktemp("vocabularies")
    learned = [text for _ in range(300) for text in (_prose(dice, 12), *_program(dice, 3).split("\n"))]
    ways = {
        "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                  "remove_extra_whitespaces": False, "user_defined_symbols": ["\u2581" * 2, "\u2581" * 4]},
        "t5": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    }
    files = {}
    for name, way in ways.items():
        buffer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(learned), model_writer=buffer, vocab_size=400, hard_vocab_limit=False, pad_id=3,
            add_dummy_prefix=True, minloglevel=2, **way)
        files[name] = str(folder / f"{name}.model")
        Path(files[name]).write_bytes(buffer.getvalue())
    return files


@pytest.fixture(scope="session")
def beginning_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer.json that gives the ids of python_8k, and begins each text with id 0."""
    from codellm_jax.tokenizing.conversion import write_tokenizer
    from codellm_jax.vocabulary import load_vocabulary

    folder = str(tmp_path_factory.mktemp("tokenizer"))
    assert write_tokenizer(load_vocabulary("python_8k", begin_id=0), folder) is None
    return folder


@pytest.fixture(scope="session")
def tiny_documents() -> dict[tuple[str, str], list[str]]:
    """Maps (corpus, split) to documents from one word to many rows long."""
    dice = random.Random(7)
    sizes = [1, 2, 3, 5, 8, 13, 30, 60, 90, 400]
    return {
        ("text.tiny", "train"): [_prose(dice, size) for size in sizes * 2],
        ("text.tiny", "validation"): [_prose(dice, size) for size in (1, 20, 150, 40)],
        ("code.tiny", "train"): [_program(dice, size) for size in (0, 1, 2, 3, 5, 8, 13, 20, 1, 30)],
        ("code.tiny", "validation"): [_program(dice, size) for size in (0, 12, 4, 9)],
    }


@pytest.fixture(scope="session")
def tiny_corpora(tmp_path_factory: pytest.TempPathFactory, tiny_documents: Any) -> dict[str, dict[str, Any]]:
    """CORPORA of two JSON-lines corpora, text.tiny and code.tiny, with separate validation files."""
    folder = tmp_path_factory.mktemp("corpora")
    files = {key: write_json_lines(folder / f"{'.'.join(key)}.jsonl", documents)
             for key, documents in tiny_documents.items()}
    return {name: {"json_lines": files[name, "train"], "validation": files[name, "validation"]}
            for name in ("text.tiny", "code.tiny")}


@pytest.fixture(scope="session")
def tiny_instructions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """CORPORA of two files of {input, target} records, text.asked and code.asked, with a fifth held out."""
    dice, folder = random.Random(11), tmp_path_factory.mktemp("instructions")
    makers = {"text.asked": lambda: (_prose(dice, dice.randint(1, 3)), _prose(dice, dice.randint(1, 9))),
              "code.asked": lambda: (f"Add {dice.randrange(1000)}.",
                                     dice.choice([f"x + {dice.randrange(1000)}", _program(dice, 0)]))}
    corpora = {}
    for name, make in makers.items():
        records = [dict(zip(("input", "target"), make(), strict=True)) for _ in range(60)]
        (folder / f"{name}.json").write_text(json.dumps(records))
        corpora[name] = {"instructions": str(folder / f"{name}.json"), "holdout": 0.2}
    return corpora


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory, tiny_corpora: dict[str, dict[str, Any]]) -> str:
    """A CACHE_DIR that holds the rows of the tiny corpora, 32 tokens each in the shipped vocabulary."""
    import tasks
    from codellm_jax.mixture.rows import cached_rows
    from codellm_jax.vocabulary import load_vocabulary

    cache_dir = str(tmp_path_factory.mktemp("cache"))
    definitions = tasks.Definitions(modules=("tasks.pretraining",), corpora=tiny_corpora)
    for name in tiny_corpora:
        cached_rows(name, definitions, load_vocabulary("python_8k"), LENGTH, cache_dir, report=lambda line: None)
    return cache_dir


@pytest.fixture(scope="session")
def make_training(
    tmp_path_factory: pytest.TempPathFactory, tiny_corpora: dict[str, dict[str, Any]],
    tiny_instructions: dict[str, dict[str, Any]], tiny_cache: str,
) -> Callable[..., Any]:
    """Makes a `Training` of a micro model on the tiny corpora, or with stage="tuning" on the tiny instructions.

    Overrides name fields of Training or of Mixture.
    """
    import tasks
    from codellm_jax.mixture.mixture import Mixture
    from codellm_jax.model.decoder import DecoderConfig
    from codellm_jax.runtime.optimization import adamw, warmup_cosine
    from codellm_jax.runtime.partitioning import MeshShape
    from codellm_jax.training.plan import Training
    from codellm_jax.vocabulary import load_vocabulary

    of_training = {field.name for field in dataclasses.fields(Training)}
    of_mixture = {field.name for field in dataclasses.fields(Mixture)}

    def make(**overrides: Any) -> Training:
        unknown = set(overrides) - of_training - of_mixture
        assert not unknown, f"neither Training nor Mixture has {unknown}"
        corpora = tiny_instructions if overrides.get("stage") == "tuning" else tiny_corpora
        mixture = Mixture(**{
            "name": list(corpora), "lengths": {"targets": LENGTH}, "code_rate": 1 / 3, "cache_dir": tiny_cache,
            "definitions": tasks.Definitions(modules=("tasks.pretraining",), corpora=corpora),
        } | {name: value for name, value in overrides.items() if name in of_mixture})
        steps = overrides.get("train_steps", 12)
        return Training(**{
            "model_dir": str(tmp_path_factory.mktemp("run")), "mixture": mixture,
            "vocabulary": load_vocabulary("python_8k"),
            "model": functools.partial(DecoderConfig, layers=3, hidden=32, heads=2, feedforward=64),
            "optimizer": adamw, "learning_rate": warmup_cosine(1e-2, 1e-4, min(3, steps - 1), steps),
            "mesh": MeshShape(data=-1), "batch_size": 8, "train_steps": steps, "eval_period": 6,
            "checkpoint_period": 4, "log_period": 1, "eval_rows": 8,
        } | {name: value for name, value in overrides.items() if name in of_training})

    return make


@pytest.fixture(scope="session")
def tiny_flags(tiny_corpora: dict[str, dict[str, Any]], tiny_cache: str) -> list[str]:
    """Flags of `t5x train` for a micro model on the tiny corpora; the test sets MODEL_DIR and TRAIN_STEPS."""
    return [
        "--gin_file=gin/mixed_pretrain.gin", f"--gin.CORPORA={tiny_corpora}", f"--gin.CACHE_DIR={tiny_cache}",
        f"--gin.MIXTURE_OR_TASK_NAME={list(tiny_corpora)}", f"--gin.TASK_FEATURE_LENGTHS={{'targets': {LENGTH}}}",
        "--gin.model.layers=3", "--gin.model.hidden=32", "--gin.model.heads=2", "--gin.model.feedforward=64",
        "--gin.WARMUP_STEPS=2", "--gin.train.eval_rows=8"]


@pytest.fixture(scope="session")
def tiny_tuning_flags(tiny_instructions: dict[str, dict[str, Any]], tiny_cache: str) -> list[str]:
    """Flags of `t5x train` for tuning on the tiny instructions; the test sets the arm, its initial checkpoint and
    MODEL_DIR.
    """
    return [f"--gin.CORPORA={tiny_instructions}", f"--gin.CACHE_DIR={tiny_cache}", "--gin.WARMUP_STEPS=2",
            f"--gin.MIXTURE_OR_TASK_NAME={list(tiny_instructions)}", "--gin.BATCH_SIZE=10", "--gin.train.eval_rows=8",
            "--gin.LEARNING_RATE=1e-3"]


@pytest.fixture
def of_one_host() -> Callable[..., Any]:
    """Makes the view of a sharding from a process that holds only some of its devices: (sharding, devices) -> view."""

    class View:
        def __init__(self, sharding: Any, devices: set[Any]) -> None:
            self._sharding, self._devices = sharding, devices

        def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[Any, Any]:
            whole = self._sharding.addressable_devices_indices_map(shape)
            return {device: index for device, index in whole.items() if device in self._devices}

    return View


@pytest.fixture(scope="session")
def pretrained(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two run directories of four steps: NL, without code, and CODE."""
    from codellm_jax import cli

    folder = tmp_path_factory.mktemp("pretrained")
    for name, rate in (("NL", 0.0), ("CODE", 0.5)):
        assert cli.main(["train", *tiny_flags, f"--gin.MODEL_DIR={folder / name}", f"--gin.CODE_RATE={rate}",
                         "--gin.TRAIN_STEPS=4", "--gin.model.activation=fast_gelu"]) == 0
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(folder), *arguments], check=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with the layout of this package, whose commit a remote has."""
    folder = tmp_path / "checkout"
    (folder / "codellm_jax" / "pods").mkdir(parents=True)
    (folder / "codellm_jax" / "pods" / "launch.py").write_text("")
    (folder / "mine.gin").write_text("include 'gin/mixed_pretrain.gin'\n")
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "first")
    git(folder, "remote", "add", "origin", "https://host/me/code.git")
    git(folder, "update-ref", "refs/remotes/origin/main", "HEAD")  # as after a push
    return folder
