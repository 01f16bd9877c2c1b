"""Transforms of code with tree-sitter's grammars: JavaScript, Java, C and Go.

Each function of a grammar takes the text of a file and returns its text after a transform, like `python_code` for
Python. All raise SyntaxError if the grammar finds an error in the file, and ImportError if the extra
`tree_sitter` is not installed, which `missing` reports beforehand.

A name is renamed at all its occurrences in a file, or nowhere. It is renamed if the file declares it (functions,
classes, parameters, variables; `declares` lists the places), unless it also occurs as something else: a field, a type,
a label or a package (other identifier kinds of the grammar), or in one of the places of `foreign`, such as an import
or the method of another object; or it is one of `reserved`, to which the language refers by name.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

from tasks.corpora.renaming import Naming
from tasks.corpora.words import keyword_in_words, operator_in_words

_REST_OF_LINE = re.compile(rb"[ \t\f]*(\r?\n|\Z)")
_WORD = re.compile(r"[^\W\d]\w*")
_COMMENTS = ("comment", "line_comment", "block_comment", "html_comment")
# Node kinds that grammars may or may not split; each is one token here.
_LITERALS = ("string", "char", "literal", "regex", "hash_bang")
_WITH_CODE = ("template_string", "composite_literal", "func_literal", "class_literal")  # literals of several tokens
_OF_TYPES = ("declarator", "_type", "type_arguments", "type_parameters", "pointer_expression", "template_substitution")

# A place is a kind of node and the field, or None, that holds the name.
Places = frozenset[tuple[str, str | None]]


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The reader of a language; its functions are those of `python_code`."""

    package: str  # on PyPI
    suffixes: tuple[str, ...]
    declares: Places
    foreign: Places
    reserved: frozenset[str]

    @functools.cached_property
    def _parser(self) -> Any:
        import tree_sitter

        grammar = importlib.import_module(self.package.replace("-", "_"))
        return tree_sitter.Parser(tree_sitter.Language(grammar.language()))

    def _root(self, content: bytes) -> Any:
        """The syntax tree of a file; raises SyntaxError if there is an error."""
        root = self._parser.parse(content).root_node
        if root.has_error:
            raise SyntaxError("the grammar finds an error")
        return root

    def strip_comments(self, source: str) -> str:
        """Removes comments; a line with nothing else is removed, and a comment between code becomes a blank."""
        content = source.encode()
        tokens = _tokens(self._root(content))
        kept, end = bytearray(), 0
        for comment in (token for token in tokens if token.type in _COMMENTS):
            # Some grammars include the line end in a comment.
            begin, after = comment.start_byte, comment.start_byte + len(comment.text.rstrip(b"\r\n"))
            kept += content[end:begin]
            rest = _REST_OF_LINE.match(content, after)
            end = after
            if rest is None:  # it separates code like white space
                kept += b"\n" if b"\n" in content[begin:after] else b" "
                continue
            before = kept[kept.rfind(b"\n") + 1 :]
            if before.strip():
                del kept[len(kept) - len(before) + len(before.rstrip()) :]
                end = rest.start(1)
            else:
                del kept[len(kept) - len(before) :]
                end = rest.end()
        result = bytes(kept) + content[end:]
        self._require_alike(tokens, content, result, lambda texts: texts)
        return result.decode()

    def comments_only(self, source: str) -> str:
        """The unchanged comments, each at the beginning of a line."""
        content = source.encode()
        found = [_text(token, content).strip() for token in _tokens(self._root(content)) if token.type in _COMMENTS]
        return "".join(f"{comment}\n" for comment in found)

    def renamed(self, source: str, naming: Naming) -> str:
        """Renames the file's own declarations, as described above."""
        content = source.encode()
        leaves = _leaves(self._root(content))
        tokens = [token for token, _ in leaves]
        declared, kept, words = set[str](), set(self.reserved), set[str]()
        for token, field in leaves:
            text = _text(token, content)
            if token.type == "identifier":
                declared |= {text} if _stands_in(token, field, self.declares) else set()
                kept |= {text} if _stands_in(token, field, self.foreign) else set()
            elif token.type.endswith("identifier") or token.type.endswith("identifier_pattern"):
                kept.add(text)
            elif token.type == "preproc_arg" or (token.parent and token.parent.type == "import_spec"):
                kept |= {*_WORD.findall(text)}
            words |= {*_WORD.findall(text)}
        ours = declared - kept
        chosen = [token for token in tokens if token.type == "identifier" and _text(token, content) in ours]
        new = naming([_text(token, content) for token in chosen], words - ours)
        pieces, end = [], 0
        for token, name in zip(chosen, new, strict=True):
            pieces += [content[end : token.start_byte], name.encode()]
            end = token.end_byte
        result = b"".join([*pieces, content[end:]])
        names = dict(zip((token.start_byte for token in chosen), new, strict=True))
        self._require_alike(tokens, content, result, lambda texts: [
            names.get(token.start_byte, text) for token, text in zip(_code(tokens), texts, strict=True)])
        return result.decode()

    def pseudocode(self, source: str) -> str:
        """The lines of code with their indentation, with operators and keywords in words (see `words`)."""
        content = source.encode()
        lines: dict[int, list[str]] = {}
        for token in _tokens(self._root(content)):
            row, column = token.start_point.row, token.start_point.column
            text = _text(token, content).strip()
            if row not in lines:
                begin = token.start_byte - column
                before = content[begin : token.start_byte].decode()
                lines[row] = ["", before if before.isspace() else ""]
            if text and not token.is_named and not token.parent.type.endswith(_OF_TYPES):
                text = keyword_in_words(text) if text[0].isalpha() else operator_in_words(text)
            elif token.type in ("null", "nil", "this"):
                text = keyword_in_words(text)
            lines[row] += [text] if text else []
        return "".join(f"{line[1]}{' '.join(line[2:])}\n" for _, line in sorted(lines.items()) if line[2:])

    def _require_alike(self, tokens: list[Any], content: bytes, result: bytes, change: Any) -> None:
        """Raises SyntaxError unless the result has the structure of the file and differs only in token texts."""
        after = [(token.type, _text(token, result).strip()) for token in _code(_tokens(self._root(result)))]
        texts = change([_text(token, content).strip() for token in _code(tokens)])
        if after != [(token.type, text) for token, text in zip(_code(tokens), texts, strict=True)]:
            raise SyntaxError("the grammar reads the result as different code")


def _stands_in(token: Any, field: str | None, places: Places) -> bool:
    """Whether an identifier, in a field of its parent, is in one of these places."""
    parent = token.parent
    place, around = (parent.type, field), parent.parent
    if place == ("function_declarator", "declarator"):  # C: excludes functions that are only declared
        while around is not None and around.type.endswith("declarator"):
            around = around.parent
        return around is not None and around.type == "function_definition" and place in places
    if place in (("field_access", "field"), ("method_invocation", "name")):  # Java: a member of another object
        owner = parent.child_by_field_name("object")
        return owner is not None and owner.type != "this" and place in places
    if parent.type == "literal_element":  # Go: the key of a struct
        return around is not None and around.type == "keyed_element" and place in places and (
            around.named_children[0] == parent)
    if parent.type == "expression_list" and around is not None:  # Go: the left-hand side
        return any(around.child_by_field_name(side) == parent and (around.type, side) in places
                   for side in ("left", "alias"))
    if place == ("method_declaration", "name") and ("method_declaration", "inherited") in places:  # Java
        return around.parent is not None and any(
            each.type in ("superclass", "super_interfaces", "extends_interfaces") for each in around.parent.children)
    return place in places


def _leaves(root: Any) -> list[tuple[Any, str | None]]:
    """The leaves of a syntax tree, in order, with their fields; a literal is one leaf."""
    found = []
    cursor = root.walk()
    while True:
        node = cursor.node
        is_literal = node.type.endswith(_LITERALS) and node.type not in _WITH_CODE
        if not is_literal and cursor.goto_first_child():
            continue
        if node.end_byte > node.start_byte:
            found.append((node, cursor.field_name))
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return found


def _tokens(root: Any) -> list[Any]:
    return [token for token, _ in _leaves(root)]


def _code(tokens: list[Any]) -> Iterator[Any]:
    # A line end is a token in some places, and white space in others.
    return (token for token in tokens if token.type not in _COMMENTS and token.text.strip())


def _text(token: Any, content: bytes) -> str:
    return content[token.start_byte : token.end_byte].decode()


def _places(text: str) -> Places:
    """Parses places from words such as "kind.field", or "kind" without a field."""
    return frozenset((kind, field or None) for kind, _, field in (each.partition(".") for each in text.split()))


def missing(grammar: Grammar) -> list[str]:
    """The packages that a grammar needs but that are not installed."""
    return [package for package in ("tree-sitter", grammar.package)
            if importlib.util.find_spec(package.replace("-", "_")) is None]


LANGUAGES = {
    "javascript": Grammar(
        "tree-sitter-javascript", (".js", ".mjs", ".cjs", ".jsx"),
        _places("function_declaration.name generator_function_declaration.name function_expression.name "
                "generator_function.name class_declaration.name class.name variable_declarator.name formal_parameters "
                "arrow_function.parameter rest_pattern array_pattern assignment_pattern.left pair_pattern.value "
                "catch_clause.parameter for_in_statement.left"),
        _places("import_specifier.name import_specifier.alias import_clause namespace_import export_specifier.name "
                "export_specifier.alias jsx_opening_element.name jsx_closing_element.name "
                "jsx_self_closing_element.name"),
        frozenset("undefined arguments eval module exports require".split())),
    "java": Grammar(
        "tree-sitter-java", (".java",),
        _places("class_declaration.name interface_declaration.name enum_declaration.name record_declaration.name "
                "method_declaration.name constructor_declaration.name variable_declarator.name formal_parameter.name "
                "catch_formal_parameter.name lambda_expression.parameters inferred_parameters resource.name "
                "enhanced_for_statement.name enum_constant.name instanceof_expression.name"),
        _places("scoped_identifier.scope scoped_identifier.name import_declaration package_declaration annotation.name "
                "marker_annotation.name element_value_pair.key field_access.field method_invocation.name "
                "method_reference method_declaration.inherited annotation_type_declaration.name"),
        frozenset("main toString equals hashCode compareTo clone finalize length super".split())),
    "c": Grammar(
        "tree-sitter-c", (".c", ".h"),
        _places("init_declarator.declarator parameter_declaration.declarator pointer_declarator.declarator "
                "array_declarator.declarator function_declarator.declarator declaration.declarator enumerator.name "
                "preproc_def.name preproc_function_def.name preproc_params"),
        _places("preproc_defined preproc_ifdef.name"),
        frozenset(["main"])),
    "go": Grammar(
        "tree-sitter-go", (".go",),
        _places("function_declaration.name parameter_declaration.name variadic_parameter_declaration.name "
                "var_spec.name const_spec.name short_var_declaration.left range_clause.left receive_statement.left "
                "type_switch_statement.alias"),
        _places("literal_element"),
        frozenset("main init append cap clear close complex copy delete imag len make max min new panic print println "
                  "real recover true false nil iota any bool byte comparable error string int uint rune".split())),
}
