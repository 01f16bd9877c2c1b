"""Fields of records: found by name, asked by `where`, and put together as one text by a template.

A name is that of a field, or leads by dots into fields within, as in "meta.language". A field whose own name holds dots
comes before what they would lead to.

  'where': {'language': ['Python', 'Go']}       one of these, or one of these among a list
           {'score': {'at_least': 3}}           a number, or a text such as a date, from here on; `at_most` likewise
           {'meta.kept': True}                  this one

A record is taken where all conditions hold. A number that is written as text, as all are in CSV, counts as that number.

  'text': '{title}\n\n{body}'                   braces of the text itself are written twice, as in str.format
"""

import datetime
import decimal
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.corpora.files import Found, Lost

_TEXTLESS, _LACKING = "without text in field {!r}", "without the field {!r} of 'where'"
_BOUNDS = ("at_least", "at_most")
BESIDE = "beside"  # no option of users: fields that are read where records have them


def value(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field; None where there is none."""
    if name in record:
        return record[name]
    at = name.find(".")
    while at > 0:
        inner = record.get(name[:at])
        if isinstance(inner, Mapping):
            return value(inner, name[at + 1 :])
        at = name.find(".", at + 1)
    return None


def names(template: str) -> list[str]:
    """The fields that a template names, in its order.

    Raises:
      ValueError: it is no template, or names none.
    """
    found = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is not None:
            if not name.strip() or form or conversion:
                raise ValueError("its braces hold something else than the name of a field")
            found.append(name)
    if not found:
        raise ValueError("it names no field")
    return found


def wanted(spec: Mapping[str, Any], default: str) -> list[str]:
    """The fields that are read for the documents of a spec, each once; `default` holds the text where it says none."""
    of_text = names(spec["text"]) if "text" in spec else [spec.get("field", default)]
    language = ["language"] if "transform" in spec and "language" not in spec else []
    return list(dict.fromkeys([*of_text, *spec.get("where", ()), *language, *spec.get(BESIDE, ())]))


def lacking(present: Callable[[str], bool], spec: Mapping[str, Any], default: str) -> str | None:
    """Why no record of a file gives a document, whose fields are the same in all; None where some may."""
    for name in spec.get("where", ()):
        if not present(name):
            return _LACKING.format(name)
    for name in names(spec["text"]) if "text" in spec else [spec.get("field", default)]:
        if not present(name):
            return _TEXTLESS.format(name)
    return None


def named(has: Sequence[str]) -> str:
    """What to call the fields of a record in messages."""
    return f"whose fields are {', '.join(map(repr, has[:5])) or 'none'}" + ", ..." * (len(has) > 5)


def found(place: str, record: Mapping[str, Any] | Lost, spec: Mapping[str, Any], default: str = "text") -> Found:
    """The document that a record holds, or why there is none.

    Args:
      place: of the record, for messages.
      spec: its options `field` or `text`, `where` and `licenses` are looked at.
      default: the field of the text where `spec` says none.
    """
    if isinstance(record, Lost):
        return Found(place, record)
    if "licenses" in spec and record.get("license") not in spec["licenses"]:
        return Found(place, Lost("of other licences"))
    if lost := unlike(record, spec.get("where", {})):
        return Found(place, lost)
    language, licence = _told(record.get("language")), _told(record.get("license"))
    if "text" in spec:
        return Found(place, _filled(spec["text"], record), language, licence=licence)
    field = spec.get("field", default)
    text = value(record, field)
    if not isinstance(text, str | bytes):
        return Found(f"{place}, {named(list(record))}", Lost(_TEXTLESS.format(field)))
    return Found(place, text, language, licence=licence)


def _told(given: Any) -> str | None:
    """A text that is not empty; None of anything else."""
    given = given if given is None else _plain(given)
    return given if isinstance(given, str) and given else None


def _filled(template: str, record: Mapping[str, Any]) -> str | Lost:
    parts = []
    for before, name, _, _ in string.Formatter().parse(template):
        parts.append(before)
        if name is None:
            continue
        filling = _plain(value(record, name))
        if isinstance(filling, bool) or not isinstance(filling, str | int | float):
            return Lost(_TEXTLESS.format(name))
        parts.append(str(filling))
    return "".join(parts)


# ---- Where -------------------------------------------------------------------------------------


def unlike(record: Mapping[str, Any], where: Mapping[str, Any]) -> Lost | None:
    """Why a record is not taken; None where it is."""
    for name, condition in where.items():
        asked = _plain(value(record, name))
        if asked is None:
            return Lost(_LACKING.format(name))
        if not _holds(asked, condition):
            return Lost(f"not matching 'where' in field {name!r}")
    return None


def _holds(asked: Any, condition: Any) -> bool:
    if isinstance(condition, Mapping):
        bounds = [(bound, condition[bound]) for bound in _BOUNDS if bound in condition]
        for bound, limit in bounds:
            here = asked if isinstance(limit, str) else _number(asked)
            if here is None or isinstance(here, str) != isinstance(limit, str):
                return False
            if here < limit if bound == "at_least" else here > limit:
                return False
        return True
    allowed = condition if isinstance(condition, list | tuple) else [condition]
    for one in asked if isinstance(asked, list | tuple) else [asked]:
        if any(_same(_plain(one), other) for other in allowed):
            return True
    return False


def _same(asked: Any, other: Any) -> bool:
    if isinstance(other, bool) or isinstance(asked, bool):
        return str(asked).lower() == str(other).lower()
    if isinstance(other, int | float):
        return _number(asked) == other
    return bool(asked == other)


def _number(asked: Any) -> float | int | None:
    if isinstance(asked, str):
        try:
            asked = float(asked)
        except ValueError:
            return None
    is_number = isinstance(asked, int | float) and not isinstance(asked, bool) and not math.isnan(asked)
    return asked if is_number else None


def _plain(asked: Any) -> Any:
    """Values as JSON has them, of those that formats with types of their own hold."""
    if hasattr(asked, "tolist"):  # of NumPy
        asked = asked.tolist()
    if isinstance(asked, bytes):
        return asked.decode(errors="surrogateescape")
    if isinstance(asked, datetime.date | datetime.datetime):
        return asked.isoformat()
    if isinstance(asked, decimal.Decimal):
        return float(asked)
    return asked


def wrong_where(where: Any) -> str | None:
    """What is wrong with the option `where`; None where nothing is."""
    if not isinstance(where, Mapping) or not where or not all(isinstance(name, str) and name for name in where):
        return "must be a mapping from fields to conditions, such as {'language': ['Python'], 'score': {'at_least': 3}}"
    for name, condition in where.items():
        if isinstance(condition, Mapping):
            if not condition or set(condition) - {*_BOUNDS}:
                return f"has for {name!r} the condition {dict(condition)!r}; give 'at_least', 'at_most' or both"
            if not all(_is_scalar(limit) and not isinstance(limit, bool) for limit in condition.values()):
                return f"has for {name!r} a bound that is neither a number nor a text: {dict(condition)!r}"
        elif isinstance(condition, list | tuple):
            if not condition or not all(map(_is_scalar, condition)):
                return f"has for {name!r} no list of texts and numbers: {condition!r}"
        elif not _is_scalar(condition):
            return f"has for {name!r} the condition {condition!r}; give a value, a list of values, or bounds"
    return None


def _is_scalar(given: Any) -> bool:
    return isinstance(given, str | bool) or (isinstance(given, int | float) and math.isfinite(given))


def wrong_template(template: Any) -> str | None:
    """What is wrong with the option `text`; None where nothing is."""
    try:
        if isinstance(template, str) and names(template):
            return None
        reason = f"found {template!r}"
    except ValueError as error:
        reason = f"of {template!r} {error}"
    return f"must be a template of fields such as '{{title}}\\n\\n{{body}}'; {reason}"
