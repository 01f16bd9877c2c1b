"""Makes sandbox tests from the records of MBPP and HumanEval.

For pass@k see `tasks.benchmarks.metrics`.
"""

import ast
import dataclasses
from collections.abc import Mapping
from typing import Any

from tasks.programs import assertions, sandbox


@dataclasses.dataclass(frozen=True)
class ProgramTests:
    """The tests of a problem, which turn generated programs into sandbox programs.

    Attributes:
      task_id: the problem's number or name.
      tests: imports, preparations and asserts, in order; or the definition of HumanEval's `check`.
      defined: names of builtins that the problem asks a program to define.
      begin: the given beginning of a program, which the generated text continues.
      entry_point: the name of the function that is passed to `check`.
    """

    task_id: int | str
    tests: tuple[str, ...]
    defined: frozenset[str] = frozenset()
    begin: str = ""
    entry_point: str = ""

    def of(self, source: str) -> sandbox.Program:
        """A sandbox program of a generated text and these tests."""
        return sandbox.Program(self.begin + source, self.tests, self.defined, self.entry_point)


def is_problem(record: Mapping[str, Any]) -> bool:
    """Whether a record has tests for programs."""
    return "test_list" in record or "entry_point" in record


def problem_tests(record: Mapping[str, Any]) -> ProgramTests:
    """The tests of a HumanEval record if there is an `entry_point`, else of an MBPP record; raises their errors."""
    return check_tests(record) if "entry_point" in record else program_tests(record)


def check_tests(record: Mapping[str, Any]) -> ProgramTests:
    """The tests of a HumanEval record.

    The reference solution precedes `check`, which may use functions defined by the prompt (problems 32, 38 and 50):
    these are the problem's own, even if a program redefines the names.

    Args:
      record: a record with `task_id`, `prompt`, `code` that continues the prompt, `test` and `entry_point`, all of
        them texts.

    Raises:
      assertions.Unjudged: its tests cannot be judged.
      ValueError: prompt and code are not Python.
    """
    solved = record["prompt"] + record["code"]
    try:
        assertions.parse(solved)
    except assertions.Unjudged as error:
        raise ValueError(f"{record['task_id']}: the solution is not Python: {solved!r:.300}") from error
    tests = (solved, record["test"])
    assertions.check_steps(tests, record["entry_point"])
    return ProgramTests(record["task_id"], tests, begin=record["prompt"], entry_point=record["entry_point"])


def program_tests(record: Mapping[str, Any], challenge: bool = False) -> ProgramTests:
    """The tests of an MBPP record, of the full file or of the sanitized one.

    A module that the asserts use but only the record's reference solution imports (problem 596, `sys`) is imported for
    the tests: a program does not fail for omitting it.

    Args:
      record: a record with `task_id`, `code`, `test_list` and, if the file has them, `test_imports`,
        `test_setup_code` and `challenge_test_list`.
      challenge: adds the challenge tests, which few problems have and published results omit.

    Raises:
      assertions.Unjudged: its tests cannot be judged.
      ValueError: a field is missing or of another form.
    """
    try:
        number, code = int(record["task_id"]), str(record["code"])
        asserts = [*record["test_list"], *(record.get("challenge_test_list", ()) if challenge else ())]
        before = [*record.get("test_imports", ()), record.get("test_setup_code", "")]
        if not all(isinstance(test, str) for test in before + asserts):
            raise TypeError("tests must be strings")
        reference = assertions.parse(code).body
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a record of MBPP ({type(error).__name__}: {error}): {str(record)[:200]}") from None
    used = {node.id for test in asserts for node in ast.walk(assertions.parse(test)) if isinstance(node, ast.Name)}
    imports = [ast.unparse(node) for node in reference if isinstance(node, ast.Import)
               and {alias.asname or alias.name for alias in node.names} & used]
    defined = frozenset(node.name for node in reference if isinstance(node, ast.FunctionDef | ast.ClassDef))
    tests = tuple(test for test in (*imports, *before, *asserts) if test.strip())
    assertions.steps(tests, defined)
    return ProgramTests(number, tests, defined)
