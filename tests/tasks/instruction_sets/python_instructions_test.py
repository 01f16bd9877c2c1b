"""Instructions made from the standard library: whole, true to their sources, and held out as pre-training holds out."""

import ast
import collections
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from tasks.corpora import specs, standard_library
from tasks.instruction_sets import instructions, python_instructions, python_members
from tasks.instruction_sets.python_instructions import Made

ROOT = pathlib.Path(__file__).resolve().parents[3]
KINDS = ("text", "code")


def _made(kind: str, file: str) -> dict[str, Made]:
    """What was made from a file, by question or by header."""
    return {one.given or one.instruction: one
            for one in python_instructions.python_instructions(kind) if one.file == file}


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_thousands_in_all_splits(kind: str) -> None:
    made = python_instructions.python_instructions(kind)
    counts = collections.Counter(one.split for one in made)
    assert counts["train"] > 3000 and min(counts["validation"], counts["test"]) > 50 and len(counts) == 3
    assert [one.file for one in made] == sorted(one.file for one in made)
    assert all(one.split == standard_library.split_of(one.file) for one in made)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_there_twice(kind: str) -> None:
    made = python_instructions.python_instructions(kind)
    assert len({one.output for one in made}) == len({(one.instruction, one.given) for one in made}) == len(made)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str) -> None:
    longest = {"text": 1200, "code": 2000}[kind]
    for one in python_instructions.python_instructions(kind):
        assert 0 < len(one.output) <= longest
        assert one.output == one.output.strip("\n") and "\n\n\n\n" not in one.instruction + one.given
        assert one.instruction.count("`") % 2 == 0 and "``" not in one.instruction, one.instruction


@pytest.mark.parametrize("kind", KINDS)
def test_answers_stand_in_their_files(kind: str) -> None:
    texts: dict[str, str] = {file.name: file.source for file in standard_library.source_files()}
    texts |= {f"topics/{topic}": text for topic, text in standard_library.topics().items()}
    texts |= {f"modules/{module}": "\n".join(member.docstring for member in members)
              for module, members in standard_library.compiled_members().items()}
    squeezed = {name: " ".join(text.split()) for name, text in texts.items()}
    found = [" ".join(one.output.split()) in squeezed[one.file]
             for one in python_instructions.python_instructions(kind)]
    # Docstrings may be written with escapes, and then read otherwise than they stand there.
    assert found.count(False) < len(found) / (100 if kind == "text" else 10**9)


def test_answers_are_documentation() -> None:
    """Every answer of a source file is part of what `ast` says is a docstring of it."""
    of_files = {file.name: "\n".join(file.docstrings) for file in standard_library.source_files()}
    for one in python_instructions.python_instructions("text"):
        if one.file in of_files:
            lines = {line.strip() for line in of_files[one.file].splitlines()}
            assert {line.strip() for line in one.output.splitlines()} <= lines | {""}


def test_programs_parse_to_what_the_library_runs() -> None:
    trees = {file.name: file.source for file in standard_library.source_files()}
    made = [one for one in python_instructions.python_instructions("code")
            if one.file in ("bisect.py", "heapq.py", "textwrap.py", "asyncio/tasks.py", "functools.py", "shutil.py")]
    assert len(made) > 50
    for one in made:
        [function] = ast.parse(f"{one.given}\n{textwrap.indent(one.output, '    ')}\n").body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        bodies = {ast.unparse(node.body[1:]) for node in ast.walk(ast.parse(trees[one.file]))
                  if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function.name}
        assert ast.get_docstring(function)
        assert ast.unparse(function.body[1:]) in bodies


def test_all_programs_parse() -> None:
    for one in python_instructions.python_instructions("code"):
        ast.parse(f"{one.given}\n{textwrap.indent(one.output, '    ')}\n")


def test_splits_agree_with_pre_training() -> None:
    """Nothing of a held-out file is trained on, and no answer or docstring is in files of two splits."""
    owners: dict[str, set[str]] = collections.defaultdict(set)
    for member in python_members.documented_members():
        owners[member.text].add(standard_library.split_of(member.file))
    for function in python_members.defined_functions():
        owners[function.body].add(standard_library.split_of(function.file))
    shared = {text for text, splits in owners.items() if len(splits) > 1}
    assert shared
    answers: dict[str, str] = {}
    for kind in KINDS:
        documents = {document.name: document.split for document in standard_library.python_corpus(kind)}
        for one in python_instructions.python_instructions(kind):
            assert documents.get(one.file, one.split) == one.split
            assert one.output not in shared
            assert answers.setdefault(one.output, one.split) == one.split


def test_known_questions() -> None:
    bisect = _made("text", "bisect.py")
    [answer] = [one for question, one in bisect.items() if "`bisect.bisect_left(a, x, lo=0, hi=None" in question]
    assert answer.output.startswith("Return the index where to insert item x in list a, assuming a is sorted.")
    builtins = [one for question, one in _made("text", "modules/builtins").items() if "`len`" in question]
    assert [one.output for one in builtins] == ["Return the number of items in a container."]
    assert any("`os.getcwd`" in question for question in _made("text", "modules/posix"))
    topics = {question for topic in standard_library.topics() for question in _made("text", f"topics/{topic}")}
    assert any('The "assert" statement' in question for question in topics)
    assert not any("._" in question for question in bisect)


def test_known_programs() -> None:
    [made] = [one for header, one in _made("code", "operator.py").items() if header.startswith("def countOf(")]
    assert made.given == 'def countOf(a, b):\n    "Return the number of items in a which are, or which equal, b."'
    assert made.output == "count = 0\nfor i in a:\n    if i is b or i == b:\n        count += 1\nreturn count"
    assert "function of the module `operator`" in made.instruction


def test_cutting_texts() -> None:
    def shortened(text: str, name: str = "m.f") -> str:
        return python_instructions._shortened(python_members.Documented("m.py", "function", name, "", text))

    first, second = "One two three four five.", "x " * 595 + "end."
    assert shortened(f"{first}\n \n{first}") == f"{first}\n\n{first}"
    assert shortened(f"{first}\n\n{second}") == first
    assert shortened(f"{first}\n\nFor example:\n\n{second}") == first
    assert shortened(f"{first} {second}") == ""
    assert shortened(f"m.f\n\n{first}") == shortened(f"f(a, [b]) -> list\n\n{first}") == first
    assert shortened(f"{first}\n\nWritten by somebody.\n\n{first}") == first
    for text in ("Too short.", f"{first[:-1]}:", f">>> {first}", f"XXX {first}", first + "\ud800"):
        assert shortened(text) == ""


@pytest.mark.parametrize(
    ("body", "trivial"),
    [("pass", True), ("...", True), ("raise NotImplementedError", True), ("return", True), ("return None", True),
     ("return x", True), ("return x + 1", False), ("return f()", False), ("x = 1\nreturn x", False)],
)
def test_trivial_bodies(body: str, trivial: bool) -> None:
    assert python_members._is_trivial(ast.parse(body).body) == trivial


def test_header_and_body() -> None:
    source = textwrap.dedent('''
        class A:
            @staticmethod
            def f(a,
                  b):
                """Says
                something.
                """

                # A comment.
                if a:

                    return b
            def g(self): "One line."; return 1
            def h(self):
                """Holds a string of lines."""
                return """a
                b"""
            def i(self):
                """Less
            indented."""
                return 1
    ''')
    [owner] = ast.parse(source).body
    assert isinstance(owner, ast.ClassDef)
    parts = [python_members._header_and_body(node, source.split("\n")) for node in owner.body
             if isinstance(node, ast.FunctionDef)]
    assert parts == [
        ('@staticmethod\ndef f(a,\n      b):\n    """Says\n    something.\n    """',
         "# A comment.\nif a:\n\n    return b"),
        None,
        None,
        ('def i(self):\n    """Less\nindented."""', "return 1"),
    ]


def test_pairs() -> None:
    spec = {"python_instructions": "code"}
    assert specs.splits(spec) == specs.SPLITS
    pairs = list(instructions.pairs(spec, "validation"))
    assert len(pairs) == sum(one.split == "validation" for one in python_instructions.python_instructions("code"))
    assert all(pair.inputs.startswith("Below is an instruction that describes a task, paired") for pair in pairs)
    texts = list(instructions.pairs({"python_instructions": "text"}, "test"))
    assert all(pair.inputs.startswith("Below") and "### Input:" not in pair.inputs for pair in texts)


@pytest.mark.slow
def test_made_the_same_again(tmp_path: pathlib.Path) -> None:
    """Processes with other hash seeds and folders make the same."""
    program = (
        "import hashlib; from tasks.instruction_sets.python_instructions import python_instructions as p; "
        "print([hashlib.sha256(repr(p(k)).encode()).hexdigest() for k in ('text', 'code')])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=folder,
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
        ).stdout
        for folder, seed in ((ROOT, "1"), (tmp_path, "2"))
    }
    assert len(runs) == 1


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="'text' and 'code', found 'prose'"):
        python_instructions.python_instructions("prose")
