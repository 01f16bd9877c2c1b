"""What is data runs no code: checkpoints, records, caches, reports, tokenizers and weights.

SECURITY.md says which is which.
"""

import ast
import json
from pathlib import Path

import pytest
from etils import epath

ROOT = Path(__file__).resolve().parent.parent
# Calls that run or build what they are given, and the only modules with a reason to.
RUNS = {
    "eval": {"tasks/programs/trial.py"}, "exec": {"tasks/programs/trial.py"},
    "compile": {"tasks/programs/trial.py", "tasks/programs/assertions.py"},
    "__import__": set[str](), "os.system": set[str](), "os.popen": set[str](),
    # Modules by names in tables of our own code, and TASK_MODULES, which are code.
    "importlib.import_module": {
        "codellm_jax/cli.py", "codellm_jax/configuration.py", "tasks/__init__.py",
        "tasks/corpora/files.py", "tasks/corpora/tree_code.py", "tasks/corpora/standard_library.py",
        "tasks/programs/values.py"},
    "yaml.load": set[str](), "yaml.unsafe_load": set[str](), "runpy.run_path": set[str](),
    "runpy.run_module": set[str](),
}
UNPICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# Named arguments that may not be true, and the one file whose own code it is.
FLAGS = {"allow_pickle": set[str](), "shell": set[str](), "trust_remote_code": set[str]()}


def sources() -> list[Path]:
    return sorted([*(ROOT / "codellm_jax").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")])


def test_nothing_that_is_read_is_run() -> None:
    for path in sources():
        require_runs_nothing(str(path.relative_to(ROOT)), ast.parse(path.read_text()))


def require_runs_nothing(name: str, module: ast.Module) -> None:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            assert not UNPICKLE & {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in UNPICKLE
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "importlib.import_module" and isinstance(node.args[0], ast.Constant):
                continue  # by a name that stands here
            assert name in RUNS.get(called, {name}), f"{called} in {name}, line {node.lineno}"
            for keyword in node.keywords:
                harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                assert keyword.arg not in FLAGS or harmless or name in FLAGS[str(keyword.arg)], (name, node.lineno)
            if called == "torch.load":
                assert any(keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
                           for keyword in node.keywords), (name, node.lineno)


def test_a_checkpoint_names_no_modules_and_no_corpora() -> None:
    """Settings of a checkpoint go on in the run that starts from it: those of the model and its vocabulary alone."""
    from codellm_jax.study.stages import TAKEN_OVER

    for name in ("TASK_MODULES", "tasks.modules", "CORPORA", "tasks.corpora", "DATA_DIR", "MODEL_DIR", "CACHE_DIR",
                 "train.optimizer", "include", "import"):
        assert not TAKEN_OVER.match(name)
    assert TAKEN_OVER.match("model.layers")


@pytest.mark.parametrize("name", ["../outside", "/etc", "..", "a/b"])
def test_a_plan_names_no_folder_outside(tmp_path: Path, name: str) -> None:
    from codellm_jax.report.write import read_study
    from codellm_jax.study.status import status

    (tmp_path / "study.json").write_text(json.dumps({"runs": [{"run": name, "steps": 3, "from": None}]}))
    for read in (lambda: read_study(epath.Path(tmp_path)), lambda: status(str(tmp_path))):
        with pytest.raises(ValueError, match="study.json is damaged: it names the run "):
            read()
