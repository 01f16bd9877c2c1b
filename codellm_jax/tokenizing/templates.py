"""Renders chat templates: Jinja, in Jinja's sandbox, as transformers does. `apart` bounds its time and memory."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Private-use characters that mark the start and the end of an answer.
FIRST, END = "\U000f0000", "\U000f0001"
# The date for templates that print one (Llama 3's), fixed so that the tokens are the same every day.
_TODAY = datetime.datetime(2024, 7, 26)
# Errors that a faulty template may raise, besides Jinja's own.
_MISTAKES = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} encloses an answer."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Any) -> str:
        return f"{FIRST}{caller()}{END}"


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson  # Jinja's own filter escapes for HTML
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": _TODAY.strftime}
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str],
           add_generation_prompt: bool) -> dict[str, str]:
    """{"text": the rendering}; {"invalid": why} if the template is not valid Jinja; {"refused": why} if it refuses the
    messages, or fails on them.
    """
    try:
        compiled = _compiled(template)
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
        where = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return {"invalid": f"{where}{_line(error)}"}
    try:
        return {"text": compiled.render({**variables, "messages": messages, "tools": None, "documents": None,
                                         "add_generation_prompt": add_generation_prompt})}
    except jinja2.TemplateError as error:
        return {"refused": f"refused by the chat template: {_line(error)}"}
    except _MISTAKES as error:
        return {"refused": f"on which the chat template fails: {_line(error)}"}


def _line(error: Exception) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__}"[:200].rstrip(".")
