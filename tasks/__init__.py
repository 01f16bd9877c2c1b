"""SeqIO tasks of training and evaluation data by module, and corpora described by specs.

Importing this package imports neither SeqIO nor TensorFlow; `Definitions.register` does.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.corpora import official, sources, specs
from tasks.instruction_sets import instructions

# For this package's modules, a name for the tasks that each defines, part of their cache keys. Change it whenever
# the same Python gives a task different texts; other changes of the file do not invalidate caches.
_DEFINITIONS = {
    "tasks.pretraining": "878b3b1f378c24bfad534189f28bc4be1c154310db988b592781067b057da107",
    "tasks.tuning": "ae69c1735a1a129fe1caa16125deef387f1c40142ed849c4c84a7059ce4bb241",
}

_CORPUS_NAME = re.compile(r"(text|code)\.[A-Za-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class Definitions:
    """The modules that define SeqIO tasks, and the corpora added to them.

    Attributes:
      modules: importable modules that register SeqIO tasks and mixtures when imported.
      corpora: your own corpora by name, text.NAME or code.NAME (the pool before the dot), each with its kind and
        options, as `corpora.sources` and `instruction_sets.instructions` describe them. After construction it also
        holds the official corpora.
      data_dir: a folder, local or gs://, that is searched for the official corpora's files by name. A spec in `corpora`
        overrides the official one.

    Raises:
      ValueError: a name or a spec is malformed.
    """

    modules: Sequence[str] = ("tasks.pretraining",)
    corpora: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    data_dir: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.modules, str) or not all(isinstance(m, str) for m in self.modules):
            raise ValueError(
                "modules must be a list of module names such as ['tasks.pretraining'], "
                f"found {self.modules!r}."
            )
        if not isinstance(self.corpora, Mapping):
            raise ValueError(f"corpora must map names to specs, found {self.corpora!r}.")
        for name, spec in self.corpora.items():
            if not isinstance(name, str) or not _CORPUS_NAME.fullmatch(name):
                raise ValueError(
                    f"A corpus is named text.NAME or code.NAME, NAME of letters, digits and "
                    f"underscores; found {name!r}."
                )
            specs.validate(spec, name)
        if self.data_dir is not None:
            if not isinstance(self.data_dir, str) or not self.data_dir.strip():
                raise ValueError(f"data_dir (DATA_DIR) must be a folder, or None; found {self.data_dir!r}.")
            merged = {**official.official_corpora(self.data_dir), **self.corpora}
            object.__setattr__(self, "corpora", merged)
        for name in self.corpora:
            self._targets(name)

    def describe(self, name: str) -> dict[str, Any]:
        """Identifies the content of a corpus, task or mixture without reading or importing it.

        For a corpus, the result of `sources.describe` or `instructions.describe`; an
        alias adds the description of its target. For any other name, the hash of each module's
        source file (a fixed name for this package's), since any of them may define the name, and the Python version,
        whose library may be read. Imports of those modules are not followed.

        Raises:
          ValueError: a module does not exist, or the name is an official one without a `data_dir`.
          FileNotFoundError: a pattern of the corpus matches no file, or an official file is missing.
        """
        if name not in self.corpora:
            self._require_folder(name)
            description = {
                "modules": {module: _DEFINITIONS.get(module) or _module_hash(module) for module in self.modules},
                "python": sys.version,
                "prefix": sys.base_prefix,
                "reader": sources.READER_VERSION,
            }
            if "tasks.tuning" in self.modules or name == official.MIXTURE:
                description["instructions"] = instructions.INSTRUCTIONS_VERSION
            return description
        spec = self.corpora[name]
        if specs.kind_of(spec) in specs.INSTRUCTION_KINDS:
            return instructions.describe(spec, name)
        description = sources.describe(spec, name)
        if "task" in spec:
            description["aliased"] = self.describe(spec["task"])
        return description

    def is_instructions(self, name: str) -> bool | None:
        """Whether a name is a corpus of instructions; None for tasks of modules and aliases of these."""
        last = [name, *self._targets(name)][-1]
        return specs.kind_of(self.corpora[last]) in specs.INSTRUCTION_KINDS if last in self.corpora else None

    def loss(self, name: str) -> str | None:
        """The option `loss` of a corpus, or else of its alias target; None if neither has one."""
        chain = [self.corpora.get(each, {}) for each in (name, *self._targets(name))]
        return next((spec["loss"] for spec in chain if "loss" in spec), None)

    def register(self) -> None:
        """Registers everything in SeqIO: first imports the modules, then adds the corpora.

        Registering again is harmless: the same corpus stays, another spec with the same name replaces it.

        Raises:
          ValueError: a module does not exist, a corpus takes the name of a module's task, or an
            alias names no task.
        """
        for module in self.modules:
            _specification(module)
            importlib.import_module(module)
        from tasks import pretraining  # Imports SeqIO.

        # The target of an alias must be registered before it.
        for name in sorted(self.corpora, key=lambda name: len(self._targets(name))):
            if specs.kind_of(self.corpora[name]) in specs.INSTRUCTION_KINDS:
                from tasks import tuning

                tuning.add_corpus(name, self.corpora[name])
            else:
                pretraining.add_corpus(name, self.corpora[name])
        if self.data_dir is not None:
            tuning.add_official_mixture()

    def _require_folder(self, name: str) -> None:
        """Refuses an official name if no folder is set for its files; a module may define the name."""
        of_modules = any(not module.startswith("tasks.") for module in self.modules)
        if self.data_dir is not None or of_modules:
            return
        if name in specs.OFFICIAL:
            raise ValueError(
                f"{name} is read from its official file, {official.file_names(name)}: set DATA_DIR to a folder that "
                "holds it, or give the corpus a CORPORA line of its own."
            )
        if name == official.MIXTURE:
            raise ValueError(
                f"{name} is a mixture of {', '.join(specs.OFFICIAL)}: set DATA_DIR to a folder that holds their files."
            )

    def _targets(self, name: str) -> list[str]:
        """The chain of names that an alias leads to; empty for other corpora."""
        chain = [name]
        while chain[-1] in self.corpora and "task" in self.corpora[chain[-1]]:
            chain.append(self.corpora[chain[-1]]["task"])
            if chain[-1] in chain[:-1]:
                raise ValueError(f"Corpora are aliases of each other: {' -> '.join(chain)}.")
        return chain[1:]


def _specification(module: str) -> Any:
    try:
        found = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None:
        raise ValueError(
            f"There is no module {module!r} in tasks.modules; "
            "correct its name, install it, or add its folder to PYTHONPATH."
        )
    return found


def _module_hash(module: str) -> str:
    """SHA-256 of a module's source file, in hexadecimal; imports only its parent packages."""
    origin = _specification(module).origin
    if origin is None or not pathlib.Path(origin).is_file():
        raise ValueError(f"The module {module!r} in tasks.modules has no source file.")
    return hashlib.sha256(pathlib.Path(origin).read_bytes()).hexdigest()
