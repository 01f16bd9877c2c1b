"""The wheel and the source distribution are well formed, and run without the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, folder: Path, path: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(path or "")})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_and_source_distribution_are_checked_and_run(tmp_path):
    pytest.importorskip("build", reason="build is not installed: pip install '.[dev]'")
    pytest.importorskip("twine", reason="twine is not installed: pip install '.[dev]'")
    checkout, built = tmp_path / "checkout", tmp_path / "dist"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "dist", "site", "__pycache__", "*.egg-info", ".*_cache"))
    # The source distribution, and the wheel from it, as an index would build them.
    run("-m", "build", "--no-isolation", "--outdir", str(built), folder=checkout)
    shutil.rmtree(checkout)
    [wheel], [source] = built.glob("*.whl"), built.glob("*.tar.gz")
    checked = run("-m", "twine", "check", "--strict", str(wheel), str(source), folder=tmp_path)
    assert checked.count("PASSED") == 2
    with tarfile.open(source) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"gin/pretrain.gin", "gin/models/tiny.gin", "LICENSE", "CHANGELOG.md", "docs/index.md", "mkdocs.yml",
            "tests/packages_test.py", "CITATION.cff"} <= inside
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel), folder=tmp_path)
    told = run("-m", "codellm_jax.cli", "explain", "BATCH_SIZE", "--gin_file=gin/mixed_pretrain.gin",
               folder=tmp_path, path=site)
    assert told.startswith("BATCH_SIZE = 8\n  set by gin/pretrain.gin:")
    planned = run("-m", "codellm_jax.cli", "study", "--gin_file=gin/study.gin", "--print_commands", folder=tmp_path,
                  path=site)
    assert "t5x train" in planned or "train --gin_file=gin/pretrain.gin" in planned
    where = "from codellm_jax.reference import settings; print(settings.__file__, len(settings.settings()))"
    file, number = run("-c", where, folder=tmp_path, path=site).split()
    assert Path(file).is_relative_to(site) and int(number) > 200
