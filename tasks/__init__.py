"""What is trained on and measured: SeqIO tasks by module, and corpora described by specs.

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

from tasks import sources

_CORPUS_NAME = re.compile(r"(text|code)\.[A-Za-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class Definitions:
    """Which modules define SeqIO tasks, and which corpora are added to theirs.

    Attributes:
      modules: importable modules that register SeqIO tasks and mixtures when imported.
      corpora: specs as `tasks.sources` describes them, by name: `text.NAME` or `code.NAME`, the
        pool before the dot.

    Raises:
      ValueError: a name or a spec is malformed.
    """

    modules: Sequence[str] = ("tasks.pretraining",)
    corpora: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

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
            sources.validate(spec, name)
        for name in self.corpora:
            self._targets(name)

    def describe(self, name: str) -> dict[str, Any]:
        """What identifies the content of a corpus, task or mixture without reading or importing it.

        For a corpus it is what `tasks.sources.describe` says; an alias of another task adds what is
        said of that one. For any other name it is the hash of each module's source file, for the
        name may be defined in any of them, and the version of Python, whose library may be read.
        Code that those modules import is not followed.

        Raises:
          ValueError: a module does not exist.
          FileNotFoundError: a pattern of the corpus matches no file.
        """
        if name not in self.corpora:
            return {
                "modules": {module: _module_hash(module) for module in self.modules},
                "python": sys.version,
                "prefix": sys.base_prefix,
                "reader": sources.READER_VERSION,
            }
        spec = self.corpora[name]
        description = sources.describe(spec, name)
        if "task" in spec:
            description["aliased"] = self.describe(spec["task"])
        return description

    def register(self) -> None:
        """Registers everything in SeqIO: first imports the modules, then adds the corpora.

        Again is harmless: the same corpus stays, another spec of the same name replaces it.

        Raises:
          ValueError: a module does not exist, a corpus takes the name of a module's task, or an
            alias names no task.
        """
        for module in self.modules:
            _specification(module)
            importlib.import_module(module)
        from tasks import pretraining  # Imports SeqIO.

        # What an alias names must be there before it.
        for name in sorted(self.corpora, key=lambda name: len(self._targets(name))):
            pretraining.add_corpus(name, self.corpora[name])

    def _targets(self, name: str) -> list[str]:
        """The names that an alias leads to, one through the other; none for other corpora."""
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
            "mend its name, or install it or put its folder on PYTHONPATH."
        )
    return found


def _module_hash(module: str) -> str:
    """SHA-256 of a module's source file, in hexadecimal; its parent packages alone are imported."""
    origin = _specification(module).origin
    if origin is None or not pathlib.Path(origin).is_file():
        raise ValueError(f"The module {module!r} in tasks.modules has no source file.")
    return hashlib.sha256(pathlib.Path(origin).read_bytes()).hexdigest()
