"""The tests' own workers: one that dies is one failed test, and the rest goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_test_that_ends_its_worker_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import pytest_xdist_make_scheduler  # noqa: F401\n")
    for file in "abcd":
        (tmp_path / f"{file}_test.py").write_text(
            "import os, pytest\n"
            "@pytest.mark.parametrize('n', range(5))\n"
            "def test_it(n):\n"
            f"    if '{file}' == 'b' and n == 2:\n"
            "        os._exit(3)\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "2", "-q", "-p", "no:cacheprovider", "-c", os.devnull,
         "--rootdir", str(tmp_path), "-o", "python_files=*_test.py", str(tmp_path)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}, capture_output=True, text=True,
        timeout=120)
    assert done.returncode == 1
    assert "crashed while running 'b_test.py::test_it[2]'" in done.stdout
    assert "1 failed, 19 passed" in done.stdout
