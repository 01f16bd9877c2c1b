"""Work goes on, or is saved, where nobody reads what it prints any more."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from codellm_jax.runtime.commands import Commands
from codellm_jax.runtime.process import stop_on_signal
from codellm_jax.runtime.terminal import LONGEST_LINE, ending_signals, one_line

ROOT = Path(__file__).resolve().parents[2]
PRINTS = """
import sys
from codellm_jax.runtime.terminal import escape_what_cannot_be_encoded, outlive_the_terminal
outlive_the_terminal()
escape_what_cannot_be_encoded()
for number in range(20_000):
    print("a line that somebody may read", number)
    print("another", file=sys.stderr)
print("\\u4e16\\u754c", "\\ud83d")
open(sys.argv[1], "w").write("done")
"""
ABANDONS = """
import asyncio
from codellm_jax.runtime.terminal import quiet_libraries

async def read(number):
    try:
        await asyncio.sleep(60 * number)
    except BaseException as error:
        raise Exception(f"read {number} of a damaged checkpoint") from error
    raise Exception("the first read failed")

class Broken:
    def __del__(self):
        raise Exception("a fault of its own")

async def reads():
    await asyncio.gather(read(0), read(1), read(2))

quiet_libraries()
loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(reads())
except Exception as error:
    print(error)
loop.close()
del loop
Broken()
read("never")
"""


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A hang-up is heard, also where these tests were started to outlive it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def start(*arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **options)


@pytest.mark.parametrize("gone", ["pipe", "full"])
def test_a_process_outlives_its_terminal(tmp_path, gone):
    """A pipe whose reader ends, and a disk that is full: for stdout and stderr alike."""
    if gone == "pipe":
        process = start("-c", PRINTS, str(tmp_path / "file"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "a line that somebody may read 0\n"
        process.stdout.close()
        process.stderr.close()
    else:
        with open("/dev/full", "w") as full:
            process = start("-c", PRINTS, str(tmp_path / "file"), stdout=full, stderr=full)
    assert process.wait(60) == 0
    assert (tmp_path / "file").read_text() == "done"


def test_reads_that_python_closes_after_another_failed_print_no_traceback_and_other_faults_do():
    process = start("-c", ABANDONS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "the first read failed\n")
    assert errors.count("Traceback") == 1 and "a fault of its own" in errors
    assert "never awaited" not in errors


def of_library(module: str, name: str, text: str) -> Exception:
    """An error as a library raises it, which is not imported here."""
    return type(name, (RuntimeError,), {"__module__": module})(text)


@pytest.mark.parametrize("name, text", [
    ("AbortedError", "All 10 retry attempts failed. The last failure: HTTP response code 503\n\t when reading gs://b/o"),
    ("FailedPreconditionError", "libcurl code 6, error details: Could not resolve host: www.googleapis.com")])
def test_storage_that_fails_is_one_line_that_says_how_to_go_on(name, text):
    said = one_line(of_library("tensorflow.python.framework.errors_impl", name, text))
    assert said.startswith("the storage fails, or cannot be reached: ") and " ".join(text.split())[:60] in said
    assert said.endswith("Start the same command again once it answers: it continues from what is there.")


def test_a_device_without_memory_is_not_taken_for_storage():
    said = one_line(of_library("jaxlib._jax", "XlaRuntimeError", "RESOURCE_EXHAUSTED: Out of memory"))
    assert said == "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory (--debug shows where)"


def test_what_the_terminal_cannot_show_is_escaped(tmp_path):
    process = start("-c", PRINTS, str(tmp_path / "file"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    env={"PYTHONIOENCODING": "ascii:strict"})
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and printed.splitlines()[-1] == rb"\u4e16\u754c \ud83d"


@pytest.mark.slow
def test_a_run_goes_on_without_its_reader_and_saves_at_a_hang_up(tiny_flags, tmp_path):
    process = start("-m", "codellm_jax.cli", "train", *tiny_flags, f"--gin.MODEL_DIR={tmp_path / 'run'}",
                    "--gin.TRAIN_STEPS=100000", "--gin.EVAL_PERIOD=100000", "--gin.CHECKPOINT_PERIOD=100000",
                    "--gin.LOG_PERIOD=10", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step "):
            break
    assert seen[-1].startswith("step "), "".join(seen)
    process.stdout.close()
    records = tmp_path / "run" / "metrics.jsonl"
    lines = len(records.read_text().splitlines())
    while len(records.read_text().splitlines()) < lines + 5:
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
    [step] = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert step >= 10 * lines


def test_a_command_whose_output_is_all_ends_quietly(tmp_path):
    process = start("-m", "codellm_jax.cli", "explain", "BATCH_SIZE", "--gin_file=gin/mixed_pretrain.gin",
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 128 + signal.SIGPIPE


def test_a_hang_up_stops_in_good_order_but_for_a_process_that_was_started_to_outlive_it():
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.wait(5)
    with Commands(report=print) as commands:
        os.kill(os.getpid(), signal.SIGHUP)
        assert commands.stopped == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a process
    try:
        assert ending_signals() == [signal.SIGTERM, signal.SIGINT]
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wait(0.2)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_line_neither_controls_the_terminal_nor_fills_it() -> None:
    assert one_line(ValueError("a\n\x1b[2J\u202e b")) == "a \\x1b[2J\\u202e b"
    assert len(one_line(ValueError("x" * 10**6))) == LONGEST_LINE + 3
    assert one_line(MemoryError()) == "there is too little memory: MemoryError"
