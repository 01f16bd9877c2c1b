"""Everything that a setting or a command takes by name, each with a line of description."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

from codellm_jax.configuration import CONFIGURABLES, LEARNING_RATES, SHIPPED, imported, shipped_gin_files
from codellm_jax.reference.documented import summary


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing of a registry.

    Attributes:
      name: as it is written in a gin file or on the command line.
      description: a sentence or two.
      options: what else it takes, or what it has: options of a corpus, templates of a benchmark.
    """

    name: str
    description: str
    options: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Registry:
    """Things of one kind.

    Attributes:
      title: what they are.
      use: how one of them is asked for.
      options: what the options of an entry are; "" where entries have none.
      entries: reads them; imports what it needs.
    """

    title: str
    use: str
    options: str
    entries: Callable[[], tuple[Entry, ...]]


def heading(file: str) -> str:
    """The first sentence or two of a shipped gin file's opening comment, up to its cost."""
    lines = []
    for line in (SHIPPED / file).read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or text.startswith(("Cost:", "Expect:", "At its real", "At their real", "t5x ")):
            break
        lines.append(text)
    return " ".join(lines)


def _gin_files(folder: str) -> tuple[Entry, ...]:
    files = [file for file in shipped_gin_files() if file.rpartition("/")[0] == folder]
    return tuple(Entry(file, heading(file)) for file in files)


def _corpora() -> tuple[Entry, ...]:
    specs = imported("tasks.corpora.specs")
    return tuple(Entry(kind, text, specs.OPTIONS[kind]) for kind, text in specs.DESCRIPTIONS.items())


def _benchmarks() -> tuple[Entry, ...]:
    described = imported("tasks.benchmarks.loading").DESCRIPTIONS
    templates = imported("tasks.benchmarks.templates").TEMPLATES
    return tuple(Entry(task, text, tuple(templates[task])) for task, text in described.items())


def _templates() -> tuple[Entry, ...]:
    templates = imported("tasks.benchmarks.templates")
    return tuple(Entry(name, text, tuple(task for task, named in templates.TEMPLATES.items() if name in named))
                 for name, text in templates.DESCRIPTIONS.items())


def _transforms() -> tuple[Entry, ...]:
    return tuple(Entry(name, text) for name, text in imported("tasks.corpora.transforms").DESCRIPTIONS.items())


def _schedules() -> tuple[Entry, ...]:
    from codellm_jax.mixture.schedules import FORMS

    return tuple(Entry(form, text) for form, text in FORMS.items())


def _learning_rates() -> tuple[Entry, ...]:
    from codellm_jax.reference.documented import parameters

    return tuple(Entry(f"@{name}()", summary(CONFIGURABLES[name]),
                       tuple(parameter.name for parameter in parameters(CONFIGURABLES[name])))
                 for name in LEARNING_RATES)


def _steps() -> tuple[Entry, ...]:
    from codellm_jax.prepare.steps import ALL, FIELDS

    def options(rule: Callable[..., object]) -> tuple[str, ...]:
        return tuple(name for name in inspect.signature(rule).parameters if name not in FIELDS)

    return tuple(Entry(name, summary(f"{rule.__module__}:{rule.__name__}"), options(rule))
                 for name, rule in ALL.items())


def _families() -> tuple[Entry, ...]:
    from codellm_jax.weights.families import FAMILIES

    return tuple(Entry(name, f"{family.architecture} of transformers.") for name, family in FAMILIES.items())


def _official() -> tuple[Entry, ...]:
    from codellm_jax.fetching.releases import releases

    return tuple(Entry(name, f"{release.title}. Licence: {release.licence}.", (*release.tasks, *release.corpora))
                 for name, release in releases().items())


REGISTRIES: Mapping[str, Registry] = {
    "arms": Registry("Shipped gin files of single commands", "--gin_file=NAME", "", lambda: _gin_files("gin")),
    "models": Registry("Shipped sizes of models", "--gin_file=NAME after that of an arm", "",
                       lambda: _gin_files("gin/models")),
    "studies": Registry("Shipped studies", "t5x study --gin_file=gin/study.gin --gin_file=NAME", "",
                        lambda: _gin_files("gin/studies")),
    "corpora": Registry("Kinds of corpora", "CORPORA = {'text.mine': {'NAME': ...}}", "options", _corpora),
    "transforms": Registry("Transforms of documents", "'transform': ['NAME'] in a corpus of CORPORA", "", _transforms),
    "benchmarks": Registry("Benchmarks", "TASKS = ['NAME'], or a file of questions", "templates", _benchmarks),
    "templates": Registry("Templates of benchmarks", "TEMPLATE = 'NAME'", "benchmarks that have it", _templates),
    "schedules": Registry("Forms of a changing mix", "MIX_PHASES = [NAME, ...]", "", _schedules),
    "learning_rates": Registry("Schedules of the learning rate", "train.learning_rate = NAME", "parameters",
                               _learning_rates),
    "steps": Registry("Steps of t5x prepare", "STEPS = ['NAME', {'name': 'NAME', OPTION: ...}]", "options", _steps),
    "families": Registry("Families of published models", "t5x import FOLDER, or hf://ORG/NAME", "", _families),
    "official": Registry("Official files of benchmarks and instruction sets", "t5x fetch NAME", "tasks and corpora",
                         _official),
}
