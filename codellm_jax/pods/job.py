"""A Cloud TPU job: an accelerator, a commit that workers can fetch, and a command whose files they can reach.

Everything is checked here, before any TPU is requested.
"""

import ast
import dataclasses
import hashlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from codellm_jax.pods.topologies import parse_topology

# The software version of each generation's machines, for generations available as queued resources.
RUNTIME_VERSIONS = {"v4": "tpu-ubuntu2204-base", "v5e": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5",
                    "v6e": "v2-alpha-tpuv6e"}
# The sub-commands of a job, and the setting with the location of their output.
VERBS = {"train": "MODEL_DIR", "eval": "CHECKPOINT_PATH", "study": "STUDY_DIR"}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """The requested TPUs: `type` is --accelerator-type of one slice."""

    name: str
    type: str
    runtime_version: str
    slices: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A commit of this package that workers can fetch, and the folder in it in which the command starts."""

    url: str
    commit: str
    folder: str


@dataclasses.dataclass(frozen=True)
class Job:
    """A t5x command, without the t5x, and the TPUs to run it on."""

    name: str
    accelerator: Accelerator
    zone: str
    source: Source
    command: tuple[str, ...]
    project: str | None = None
    spot: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise ValueError("--name must be at most 40 lower-case letters, digits and hyphens, a letter first, found "
                             f"{self.name!r}.")
        if not re.fullmatch(r"[a-z]+-[a-z]+\d+-[a-z0-9]+", self.zone):
            raise ValueError(f"--zone must be a zone such as us-central2-b, found {self.zone!r}.")

    @property
    def identity(self) -> str:
        """Equal for the same command at the same commit on the same TPUs: 16 hexadecimal digits."""
        facts = [self.name, self.accelerator.type, self.accelerator.slices, self.source.commit, self.source.folder,
                 *self.command]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def accelerator(name: str) -> Accelerator:
    """Reads v4-128, v5e-256 or v5litepod-256, v5p-128, v6e-64, or 2xv5e-256 for two slices.

    Raises:
      ValueError: Cloud TPU has no such type (the message has the nearest names), or does not provide it as a queued
        resource.
    """
    topology = parse_topology(name)
    if topology.generation not in RUNTIME_VERSIONS:
        raise ValueError(f"--tpu={name}: jobs are started on {', '.join(RUNTIME_VERSIONS)}.")
    type_ = re.sub(r"^\d+x", "", topology.name).replace("v5e-", "v5litepod-")  # Cloud TPU's name for it
    return Accelerator(name, type_, RUNTIME_VERSIONS[topology.generation], topology.slices)


def require_one_host(tpu: Accelerator) -> None:
    """Raises ValueError for a study on several hosts: each of its runs is trained by one host."""
    topology = parse_topology(tpu.name)
    most = 4 if topology.chip.cube else 8
    if topology.chips > most or topology.slices > 1:
        raise ValueError(f"--tpu={tpu.name} has several hosts, but a study trains each run on one: take at most "
                         f"{most} chips, and launch it once for each worker, each with its own --name.")


def source(folder: Path | None = None) -> Source:
    """The commit that is checked out in a folder, the current one by default.

    Raises:
      ValueError: the folder is not a checkout of this package, has uncommitted changes, or its commit is on no remote.
    """
    folder = folder or Path.cwd()
    root = _git(folder, "rev-parse", "--show-toplevel")
    if root is None or not (Path(root) / "codellm_jax" / "pods" / "launch.py").is_file():
        raise ValueError(f"{folder} is not in a git checkout of codellm_jax, which workers need to install; change "
                         "to one.")
    changed = (_git(folder, "status", "--porcelain") or "").splitlines()
    if changed:
        raise ValueError(f"Workers install a commit, but {len(changed)} files here are not committed, "
                         f"{changed[0][3:]} first: commit and push them.")
    commit = _git(folder, "rev-parse", "HEAD") or ""
    branches = (_git(folder, "for-each-ref", "--contains", commit, "--format=%(refname)", "refs/remotes") or "").split()
    if not branches:
        raise ValueError(f"Workers cannot fetch commit {commit[:12]}: no remote has it. Push it.")
    url = _git(folder, "remote", "get-url", branches[0].split("/")[2]) or ""
    return Source(_reachable(url), commit, (_git(folder, "rev-parse", "--show-prefix") or "").rstrip("/"))


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of git; None if it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise ValueError("git is not on PATH; it is needed to find the commit that workers install.") from None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _reachable(url: str) -> str:
    """A remote's address in a form that a machine without keys can read. Raises ValueError if there is none."""
    by_ssh = re.fullmatch(r"(?:ssh://)?(?:[^@/]+@)([^:/]+)(?::\d+/|[:/])(.+)", url)
    if by_ssh and not url.startswith(("http:", "https:")):
        return f"https://{by_ssh[1]}/{by_ssh[2]}"
    if re.match(r"https?://[^/]*@", url):
        raise ValueError("The remote's address holds a name or password, which commands and logs would show: remove "
                         "it with git remote set-url.")
    if not url.startswith(("http://", "https://", "git://")):
        raise ValueError(f"Workers cannot reach the commit's remote, {url}: push to one with an https address.")
    return url


def default_name(model_dir: str) -> str:
    """The name of a resource, from the last part of a run directory."""
    last = re.sub(r"[^a-z0-9]+", "-", model_dir.rstrip("/").rsplit("/", 1)[-1].lower())
    return f"t5x-{last}"[:40].rstrip("-")


def require_reachable(
    verb: str, gin_files: Sequence[str], search_paths: Sequence[str], settings: Mapping[str, str],
    shipped: Sequence[str], folder: Path | None = None,
) -> str:
    """Checks that workers can reach everything that a command names, and that its output outlives them.

    Args:
      verb: the sub-command.
      gin_files, search_paths: as on its command line.
      settings: name -> value, as gin writes it.
      shipped: the names of the gin files in the package.
      folder: where the command is entered, the current folder by default.

    Returns:
      The directory of the run.

    Raises:
      ValueError: a file or directory exists only on this machine.
    """
    folder = folder or Path.cwd()
    for file in gin_files:
        candidates = [file, *(f"{path.rstrip('/')}/{file}" for path in search_paths)]
        found = next((c for c in candidates if "://" in c or (folder / Path(c).expanduser()).is_file()), None)
        if found is None and file in shipped:
            continue
        if found is None or not ("://" in found or _is_committed(folder, found)):
            raise ValueError(f"Workers cannot read {found or file}: commit it to the checkout, or copy it to gs://.")
    name = VERBS[verb]
    for setting, text in _strings(settings):
        local = text.startswith(("/", "~", "./", "../"))
        if setting.endswith(("_DIR", "_PATH", "_dir", "_path")):
            local = "://" not in text
        if setting == "VOCABULARY" and text.endswith(".model"):
            local = "://" not in text and not _is_committed(folder, text)
        if local and setting not in ("CACHE_DIR", "mixture.cache_dir"):
            raise ValueError(f"{setting} is {text} on a local disk. Workers do not see this machine's disk, and theirs "
                             "are deleted with them: use gs://.")
    run = dict(_strings(settings)).get(name, "")
    if not run.startswith("gs://"):
        raise ValueError(f"{name} is not set; a job's files must be in gs://, since the disks of TPUs are deleted "
                         "with them.")
    return run


def _is_committed(folder: Path, path: str) -> bool:
    return _git(folder, "ls-files", "--error-unmatch", path) is not None


def _strings(settings: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every text in the literal settings, with the setting's name."""
    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from (text for part in value.values() for text in walk(part))
        elif isinstance(value, (list, tuple)):
            yield from (text for part in value for text in walk(part))

    for name, value in settings.items():
        try:
            yield from ((name, text) for text in walk(ast.literal_eval(value)))
        except (ValueError, SyntaxError):
            continue  # a reference
