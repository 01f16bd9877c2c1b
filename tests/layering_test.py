"""Which room may know which: docs/architecture.md, held by reading every import."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PURE = {"codellm_jax.arms", "codellm_jax.mixture.schedules", "codellm_jax.mixture.order", "codellm_jax.mixture.ledger",
        "codellm_jax.mixture.examples", "codellm_jax.mixture.ngrams", "codellm_jax.results.statistics",
        "codellm_jax.results.levels", "tasks.metrics", "tasks.sandbox", "tasks.trial", "tasks.confinement",
        "tasks.assertions", "tasks.values", "tasks.programs"}
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


def test_arrows_point_down():
    for name, path in modules().items():
        found = imports(path)
        room = name.split(".")[1] if name.count(".") > 1 else ""
        above = {f"codellm_jax.{verb}" for verb in (
            "cli", "flags", "configuration", "train", "plan", "evaluate", "infer", "compare", "contamination",
            "harness", "precompile", "programs", "launch", "job", "cache", "report", "study", "planned", "survey")}
        if room:
            assert not found & above, name
        if room in ("mixture", "model"):
            assert not any(other.startswith("codellm_jax.runtime") for other in found), name
        if room == "mixture":
            assert not any(other.startswith("codellm_jax.model") for other in found), name
        if room == "results":
            assert not tops(found) & ({"jax", "gin"} | HEAVY), name
            assert all(other.startswith("codellm_jax.results") for other in found
                       if other.startswith("codellm_jax")), name
        if room == "model":
            assert all(other.startswith("codellm_jax.model") for other in found
                       if other.startswith("codellm_jax")), name
        if name.startswith("tasks"):
            known = ("codellm_jax.vocabulary",)
            if name == "tasks.scheduling":  # the order of sources, which needs numpy alone
                known = ("codellm_jax.mixture.order", "codellm_jax.mixture.schedules")
            assert all(other.startswith(known) for other in found - {"codellm_jax"}
                       if other.startswith("codellm_jax")), name
        if name.startswith("codellm_jax"):
            assert "tasks" not in tops(found), name
        if "gin" in tops(found):
            assert name == "codellm_jax.configuration"
        if "matplotlib" in tops(found):
            assert name == "codellm_jax.results.plots" and "matplotlib" not in tops(imports(path, everywhere=False))
        if "orbax" in tops(found):
            assert name == "codellm_jax.runtime.checkpoints"
        if "apache_beam" in tops(found):
            assert name == "codellm_jax.cache"
            assert "apache_beam" not in tops(imports(path, everywhere=False))
        if "seqio" in tops(found) and name.startswith("codellm_jax.mixture"):
            assert name in ("codellm_jax.mixture.tokens", "codellm_jax.mixture.mixture")
        if name in ("codellm_jax.launch", "codellm_jax.job"):
            others = {other for other in found if other.startswith("codellm_jax")}
            assert others <= {"codellm_jax.job", "codellm_jax.job.Job", "codellm_jax.runtime.topologies",
                              "codellm_jax.runtime.topologies.parse_topology"}, name
            assert tops(found) <= sys.stdlib_module_names | {"codellm_jax"}, name
        if name in PURE:
            assert not tops(found) & ({"jax", "gin"} | HEAVY), name
        defines_tasks = name in ("tasks.pretraining", "tasks.tuning", "tasks.scheduling", "tasks.evaluation")
        assert not tops(imports(path, everywhere=False)) & HEAVY or defines_tasks, name


def test_gin_is_a_folder_of_files_only():
    assert not list((ROOT / "gin").rglob("*.py"))


def test_training_code_imports_without_tensorflow():
    script = ("import sys, codellm_jax.train, codellm_jax.configuration, tasks; "
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
