"""Which room may know which: docs/architecture.md, held by reading every import."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PURE = {"codellm_jax.study.arms", "codellm_jax.mixture.schedules", "codellm_jax.mixture.order",
        "codellm_jax.mixture.ledger", "codellm_jax.mixture.examples", "codellm_jax.mixture.ngrams",
        "codellm_jax.results.statistics", "codellm_jax.results.levels", "tasks.benchmarks.metrics",
        *(f"tasks.programs.{name}" for name in (
            "sandbox", "trial", "confinement", "calls", "assertions", "values", "programs"))}
HEAVY = {"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"}


def modules() -> dict[str, Path]:
    paths = [*(ROOT / "codellm_jax").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Modules that a file imports, in functions too or at its top alone."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tops(found: set[str]) -> set[str]:
    return {name.split(".")[0] for name in found}


# The rooms of the library and those that each may know. `cli` may know all of them.
ROOMS: dict[str, set[str]] = {
    "flags": {"t5x_names"},
    "t5x_names": set(),
    "fetching": set(),
    "hub": set(),
    "contents": {"hub"},
    "settings": set(),
    "tokenizing": {"contents", "hub"},
    "vocabulary": {"tokenizing", "contents"},
    "results": set(),
    "chat": {"vocabulary", "tokenizing"},
    "mixture": {"chat", "vocabulary"},
    "model": set(),
    "weights": {"runtime", "results", "mixture", "model", "vocabulary", "tokenizing", "contents", "hub"},
    "configuration": {"settings", "t5x_names", "runtime", "weights", "contents"},
    "reference": {"configuration", "settings", "flags", "fetching", "mixture", "prepare", "weights"},
    "runtime": {"mixture", "model", "results", "vocabulary"},
    "evaluation": {"chat", "configuration", "settings", "weights", "runtime", "mixture", "model", "results",
                   "vocabulary", "contents"},
    "training": {"tracking", "evaluation", "weights", "runtime", "mixture", "model", "results", "vocabulary"},
    "study": {"training", "evaluation", "configuration", "settings", "weights", "runtime", "mixture", "model",
              "results", "contents"},
    "report": {"runtime", "mixture", "results"},
    "upstream": {"training", "configuration", "settings", "weights", "runtime", "mixture", "model", "vocabulary"},
    "completion": {"settings"},
    "tracking": {"runtime", "results"},
    "watching": {"study", "report", "runtime", "mixture", "results"},
    "prepare": {"report", "runtime", "mixture", "results", "settings", "vocabulary"},
    "pods": {"training", "evaluation", "runtime", "mixture", "model"},
}
# Rooms of `tasks`, likewise; the modules that define SeqIO tasks stand above them.
TASK_ROOMS: dict[str, set[str]] = {
    "corpora": set(),
    "programs": set(),
    "instruction_sets": {"corpora"},
    "benchmarks": {"corpora", "programs"},
}
DEFINE_TASKS = {"tasks.pretraining", "tasks.tuning", "tasks.scheduling", "tasks.evaluation", "tasks.builders",
                "tasks.rows"}
# Of a library, the only modules that import it.
ONLY_IMPORTERS = {
    "gin": {"codellm_jax.configuration"},
    "matplotlib": {"codellm_jax.report.plots"},
    "orbax": {"codellm_jax.runtime.checkpoints", "codellm_jax.runtime.parts", "codellm_jax.upstream.trees"},
    "apache_beam": {"codellm_jax.runtime.beam"},
    "tokenizers": {"codellm_jax.tokenizing.fast"},
    "jieba": {"codellm_jax.tokenizing.pangu"},
    "lm_eval": {"codellm_jax.evaluation.harness"},
    "huggingface_hub": {"codellm_jax.hub"},
    "wandb": {"codellm_jax.tracking.backends"},
    "mlflow": {"codellm_jax.tracking.backends"},
    "argcomplete": {"codellm_jax.completion"},
    "pyarrow": {"tasks.corpora.columns", "codellm_jax.prepare.job"},
    "warcio": {"tasks.corpora.archives"},
    "lxml": {"tasks.corpora.pages"},
    "tree_sitter": {"tasks.corpora.tree_code"},
    "t5x": {"codellm_jax.upstream.trainer", "codellm_jax.upstream.models"},
}


def rooms(found: set[str], package: str) -> set[str]:
    """The rooms of a package that imports lead to."""
    own = {name.split(".")[1] for name in found if name.startswith(f"{package}.")}
    return own & set(ROOMS if package == "codellm_jax" else TASK_ROOMS)


def test_the_rooms_are_those_of_the_house():
    of_library = {name.split(".")[1] for name in modules() if name.startswith("codellm_jax.")}
    assert of_library - {"cli", "__init__"} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(modules()))
def test_arrows_point_down(name: str):
    path = modules()[name]
    found = imports(path)
    package, room = name.split(".")[0], name.split(".")[1]
    if name.startswith("codellm_jax"):
        assert "tasks" not in tops(found)
    if package == "codellm_jax" and room in ROOMS:
        assert rooms(found, package) <= ROOMS[room] | {room}
        assert "codellm_jax.cli" not in found
    if package == "tasks" and room in TASK_ROOMS:
        assert rooms(found, package) <= TASK_ROOMS[room] | {room}
        # How files of users are read is the same on both sides; sandboxed programs read none.
        of_library = {other for other in found if other.startswith("codellm_jax")}
        assert all(other.startswith("codellm_jax.contents") and room != "programs" for other in of_library)
        assert "jax" not in tops(found)
        assert not found & DEFINE_TASKS
    elif package == "tasks":
        known: tuple[str, ...] = ("codellm_jax.vocabulary", "codellm_jax.contents")
        if name == "tasks.scheduling":  # the order of sources, which needs numpy alone
            known = ("codellm_jax.mixture.order", "codellm_jax.mixture.schedules")
        if name == "tasks.rows":  # the rows of a run, for SeqIO
            known = ("codellm_jax.vocabulary", "codellm_jax.mixture")
        if name == "tasks.builders":  # what is published where, and how it is fetched
            known = ("codellm_jax.fetching",)
        assert all(other.startswith(known) for other in found - {"codellm_jax"} if other.startswith("codellm_jax"))
    for library, importers in ONLY_IMPORTERS.items():
        assert library not in tops(found) or name in importers
    assert not tops(imports(path, everywhere=False)) & {"matplotlib", "apache_beam"}
    if room in ("results", "report", "watching", "tracking"):
        assert not tops(found) & ({"jax", "gin"} | HEAVY)
    if "seqio" in tops(found) and name.startswith("codellm_jax"):
        assert name in ("codellm_jax.mixture.tokens", "codellm_jax.mixture.mixture")
    if name in ("codellm_jax.pods.launch", "codellm_jax.pods.job"):
        others = {other for other in found if other.startswith("codellm_jax")}
        assert others <= {"codellm_jax.pods.job", "codellm_jax.pods.job.Job", "codellm_jax.pods.topologies",
                          "codellm_jax.pods.topologies.parse_topology"}
        assert tops(found) <= sys.stdlib_module_names | {"codellm_jax"}
    if name in ("codellm_jax.weights.families", "codellm_jax.weights.layouts"):
        assert rooms(found, package) <= {"model", "weights"}
    if name in ("codellm_jax.runtime.leases", "codellm_jax.study.pace", "codellm_jax.study.status"):
        assert "jax" not in tops(found)
    if name in PURE:
        assert not tops(found) & ({"jax", "gin"} | HEAVY)
    assert not tops(imports(path, everywhere=False)) & HEAVY or name in DEFINE_TASKS


def test_no_room_knows_itself_by_way_of_others():
    for of_package in (ROOMS, TASK_ROOMS):
        list(graphlib.TopologicalSorter(of_package).static_order())  # raises where there is a circle


def test_gin_is_a_folder_of_files_only():
    assert not list((ROOT / "gin").rglob("*.py"))


def test_training_code_imports_without_tensorflow():
    script = ("import sys, codellm_jax.training.train, codellm_jax.configuration, tasks; "
              "print(sorted({'tensorflow', 'seqio', 'tensorflow_datasets'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_help_imports_no_heavy_library():
    script = ("import sys; from codellm_jax import cli\n"
              "try: cli.main(['train', '--help'])\n"
              "except SystemExit: pass\n"
              "print({'jax', 'gin', 'numpy', 'tensorflow'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip().endswith("set()")


def test_no_file_is_too_long_to_read():
    for name, path in modules().items():
        assert len(path.read_text().splitlines()) <= 450, name
