"""The records of MBPP and HumanEval as programs with tests."""

import json
import pathlib

import pytest

from tasks.programs import sandbox
from tasks.programs.programs import check_tests, program_tests

DATA = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "benchmarks" / "mbpp"
needs_sandbox = pytest.mark.skipif(not all(sandbox.guarantees().values()), reason="this host lacks namespaces")

FULL = {"text": "Add.", "task_id": 7,
        "code": "import sys\r\nclass Pair: \r\n  pass\r\ndef sum(p): \r\n  return p.a + p.b",
        "test_setup_code": "pair = Pair()\r\npair.a = 1\r\npair.b = 2", "challenge_test_list": ["assert sum(pair) > 2"],
        "test_list": ["assert sum(pair) == 3", "assert sys.maxsize > sum(pair)"]}
SANITIZED = {"source_file": "x", "task_id": 8, "prompt": "Halve.", "code": "def half(x): return x / 2",
             "test_imports": ["import math"], "test_list": ["assert math.isclose(half(3), 1.5)"]}


def test_full_record():
    tests = program_tests(FULL)
    assert tests.task_id == 7 and tests.defined == {"Pair", "sum"}
    assert tests.tests == ("import sys", FULL["test_setup_code"], *FULL["test_list"])
    assert program_tests(FULL, challenge=True).tests == (*tests.tests, "assert sum(pair) > 2")


def test_sanitized_record():
    tests = program_tests(SANITIZED)
    assert tests.tests == ("import math", "assert math.isclose(half(3), 1.5)") and tests.defined == {"half"}


@pytest.mark.parametrize("change", [{"code": "def"}, {"test_list": None}, {"test_list": [3]}, {"task_id": "x"}])
def test_record_of_another_form(change):
    with pytest.raises(ValueError, match="not a record of MBPP"):
        program_tests({**SANITIZED, **change})


def test_a_program_runs_on_any_host():
    """Whatever of its guarantees a host lacks; the other tests of the sandbox are left out there."""
    right, wrong = (program_tests(SANITIZED).of(f"def half(x): return x {by} 2") for by in ("/", "*"))
    outcomes = sandbox.run_programs([right, wrong], insist=True)
    assert [outcome.verdict for outcome in outcomes] == ["passed", "failed"], outcomes


def test_texts_that_utf_8_cannot_hold():
    """A program with lone surrogates gets a verdict, and what is told of any program can be written."""
    sources = ["x = '\ud800'\ndef half(x): return x / 2", "def half(x): raise ValueError('\ud800\x00\u2028')",
               "\x00", "def half(x): return '\ud83d'",
               "class \u0391\u030a(Exception): pass\ndef half(x): raise \u0391\u030a"]
    outcomes = sandbox.run_programs([program_tests(SANITIZED).of(source) for source in sources], insist=True)
    assert [outcome.verdict for outcome in outcomes] == ["failed"] * 5, outcomes
    assert all(outcome.detail.encode() and outcome.detail.isprintable() for outcome in outcomes)
    assert outcomes[0].detail.startswith("UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800'")


@needs_sandbox
def test_reference_passes_and_others_do_not():
    programs = [program_tests(record).of(record["code"]) for record in (FULL, SANITIZED)]
    programs += [program_tests(SANITIZED).of("def half(x): return x // 2"), program_tests(FULL).of("")]
    outcomes = sandbox.run_programs(programs)
    assert [outcome.passed for outcome in outcomes] == [True, True, False, False]
    assert outcomes[3].detail == "NameError: name 'Pair' is not defined"


@needs_sandbox
@pytest.mark.skipif(not DATA.exists(), reason="needs MBPP's files beside the repository, in shared/data")
def test_reference_solutions_pass():
    """Every twentieth problem; all 974 and all 427 passed when last run in whole (their slowest is 123)."""
    records = [json.loads(line) for line in (DATA / "mbpp.jsonl").read_text().splitlines()]
    sanitized = json.loads((DATA / "sanitized-mbpp.json").read_text())
    assert (len(records), len(sanitized)) == (974, 427)
    named = {record["task_id"]: record for record in records}
    chosen = [*records[::20], *sanitized[::20], named[126], named[367], named[596], named[927]]
    every = [program_tests(record, challenge=True) for record in records + sanitized]
    assert len(every) == 1401
    outcomes = sandbox.run_programs([program_tests(record, challenge=True).of(record["code"]) for record in chosen])
    pairs = zip(chosen, outcomes, strict=True)
    assert not [(record["task_id"], outcome) for record, outcome in pairs if not outcome.passed]


# ---- HumanEval ---------------------------------------------------------------------------------

CHECKED = {"task_id": "h/1", "entry_point": "halve", "code": "    return x / 2\n", "prompt": '''def double(x):
    return 2 * x


def halve(x):
    """Half of x; ValueError of a text."""
''', "test": """import math


def check(candidate):
    for x in range(5):
        assert double(candidate(x)) == x
    assert math.isclose(candidate(x=0.2), 0.1) and halve(6) == 3
    try:
        candidate('x')
    except ValueError:
        return
    assert False, 'no error'
"""}
RIGHT = "    if isinstance(x, str):\n        raise ValueError\n    return x / 2\n"


def outcome_of(source: str, record: dict = CHECKED) -> sandbox.Outcome:
    return sandbox.run_programs([check_tests(record).of(source)], insist=True)[0]


def test_check_as_plain_exec_would():
    """The same programs with `exec` of prompt, program, tests and a call of check, as HumanEval's own harness does."""
    for source in (RIGHT, "    return x / 2\n", RIGHT.replace("/ 2", "/ 3"), RIGHT.replace("ValueError", "KeyError"),
                   "    return None\n", "    return x /\n", "", RIGHT + "\n\nhalve = None\n"):
        names: dict = {}
        try:
            exec(CHECKED["prompt"] + source + CHECKED["test"] + "\ncheck(halve)", names)
            wanted = True
        except Exception:
            wanted = False
        assert outcome_of(source).passed == wanted, source
    assert outcome_of(RIGHT.replace("/ 2", "/ 3")).detail == "AssertionError (in assert double(candidate(x)) == x)"


@pytest.mark.parametrize("attack", [
    "    import sys\n    sys.modules['__main__'].check = sys.modules['program'].double = lambda *a: 0\n",
    "    import os\n    os._exit(0)\n", "    raise SystemExit(0)\n", "    raise AssertionError\n",
    "    class Any:\n        def __eq__(self, other): return True\n        def __rmul__(self, other): return self\n"
    "        def __float__(self): return 0.1\n    return Any()\n",
    "    return None\ndef double(x):\n    return x\ndef check(candidate):\n    pass\n"])
def test_check_is_not_fooled(attack):
    assert not outcome_of(attack).passed


def test_a_test_that_catches_everything_hides_no_crash():
    swallows = CHECKED | {"test": "def check(candidate):\n    try:\n        candidate(1)\n    except BaseException:\n"
                                  "        pass\n    assert True\n"}
    assert outcome_of("    raise ValueError\n", swallows).passed  # as plain `exec`
    assert outcome_of("    import os\n    os._exit(0)\n", swallows).verdict == "crashed"


@pytest.mark.parametrize("test,reason", [
    ("def check(candidate): pass", "that assert nothing about the program"), ("x = 1", "that define no function check"),
    ("def check(a, b):\n    assert a", "that define no function check"), ("def check(candidate", "that are not Python"),
    ("def check(candidate):\n    assert 1 == 1", "that assert nothing about the program")])
def test_checks_that_cannot_be_judged(test, reason):
    with pytest.raises(ValueError, match=reason):
        check_tests(CHECKED | {"test": test})
    with pytest.raises(ValueError, match="^h/1: the solution is not Python: "):
        check_tests(CHECKED | {"code": "    return x /"})


def test_a_prompt_that_is_no_program_by_itself():
    assert outcome_of("    return x / 2\n", CHECKED | {
        "prompt": "def halve(x):\n    # Half of x.\n", "test": "def check(f):\n    assert f(3) == 1.5"}).passed
