"""The origin of a run and its results: configuration, code, packages.

MODEL_DIR/provenance.json of a training run:

  config_hash   of every setting that changes what is computed
  asked         the settings of gin files and flags, name -> value
  arm, seed, parameters, flops_per_token
  order, vocabulary, data   fingerprints: of the order, of the vocabulary's file, of the cached rows of each source
  prepared      for sources that `t5x prepare` wrote: the folder, the hashes of its steps and inputs, and their paths
  notes         a line for each pool with too little held-out data to measure a loss
  ledger        the training data, including that of earlier stages
  code, versions, devices   of the last session: this package, other packages, devices
  sessions      the same for each start, with its first and last step, its seconds and its trainer ("runner"); the last
                step and the seconds are null if it was killed
  step, last_step, finished
  checkpoint    the digest of the newest checkpoint's record, which results also name
  kept          step -> digest of the checkpoints that KEEP_STEPS keeps
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from codellm_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "seqio", "tensorflow", "tensorflow-text",
            "sentencepiece", "gin-config", "numpy")

# Settings that a resume may change: they do not change what is computed, beyond rounding. Data and vocabulary may have
# moved; hashes show whether they are the same.
FREE_ON_RESUME = frozenset("""
    MODEL_DIR EVAL_PERIOD CHECKPOINT_PERIOD LOG_PERIOD CACHE_DIR VOCABULARY INITIAL_CHECKPOINT_PATH PACKING
    EVAL_TASKS EVAL_QUESTIONS BENCHMARKS train.evaluation EXPORT_PERIOD train.export_period
    TRACKERS train.trackers
    MIXTURE_OR_TASK_NAME TASK_MODULES CORPORA DATA_DIR mixture.name tasks.modules tasks.corpora tasks.data_dir
    train.model_dir train.eval_period train.checkpoint_period train.log_period train.keep_last
    train.keep_every train.microbatches train.initial_checkpoint_path mixture.cache_dir mixture.packing
    vocabulary.path KEEP_STEPS BRANCH_FROM train.keep_steps train.branch_from
    mesh.data mesh.fsdp mesh.model mesh.slices mesh.rules model.remat model.scan_unroll model.attention
    """.split())
# The same for an evaluation: hashes identify a task's data and questions.
FREE_IN_EVALUATION = FREE_ON_RESUME | frozenset("""
    CHECKPOINT_PATH checkpoint.path TASKS evaluation.tasks benchmarks.data_dir benchmarks.specs evaluate.results_dir
    evaluation.batch_tokens
    """.split())


def is_free_on_resume(name: str) -> bool:
    """Whether a training setting may change when a run is resumed."""
    return name in FREE_ON_RESUME or name.startswith(("evaluation.", "benchmarks.", "sampling."))


def training_hash(settings: Mapping[str, str]) -> str:
    """A hash of the operative training settings that change what is computed."""
    return _hash({name: value for name, value in settings.items() if not is_free_on_resume(name)})


def evaluation_hash(settings: Mapping[str, str]) -> str:
    """The same for an evaluation: equal for all runs that are asked the same questions in the same way."""
    return _hash({name: value for name, value in settings.items() if name not in FREE_IN_EVALUATION})


def _hash(settings: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()


def differences(before: Mapping[str, str], now: Mapping[str, str], free: Any = is_free_on_resume) -> list[str]:
    """The differences between two sets of settings, one phrase each, without names for which `free` is true."""
    names = [name for name in dict.fromkeys([*before, *now]) if not free(name) and before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name, 'not set')}, is {now.get(name, 'not set')}" for name in names]


def package_versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that results may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_version() -> dict[str, Any]:
    """This package's version; in a git checkout also the commit, and whether files differ from it."""
    root = Path(__file__).resolve().parents[2]
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:  # installed, perhaps inside another checkout
        return {"version": __version__}
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"version": __version__, "commit": _git(root, "rev-parse", "HEAD"), "dirty": bool(changed)}


def software() -> dict[str, Any]:
    """The code, package versions and devices of this process, as JSON."""
    return {"code": code_version(), "versions": package_versions(),
            "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count(),
                        "processes": jax.process_count()}}


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git; None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
