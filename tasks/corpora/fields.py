"""Fields of records: found by name, filtered by `where`, and joined into one text by a template.

A name is a field's name, or a dotted path into nested fields, such as "meta.language". A field whose name itself has
dots takes precedence over a path.

  'where': {'language': ['Python', 'Go']}       one of these, or a list with one of these
           {'score': {'at_least': 3}}           a number, or a text such as a date, not below this; `at_most` likewise
           {'meta.kept': True}                  this one

A record is taken if all conditions hold. A number written as text, as in CSV, counts as that number.

  'text': '{title}\n\n{body}'                   literal braces are doubled, as in str.format
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
BESIDE = "beside"  # an internal option: further fields, read if records have them


def value(record: Mapping[str, Any], name: str) -> Any:
    """The value of a field; None if there is none."""
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
    """The fields that a template names, in order.

    Raises:
      ValueError: it is not a template, or names no field.
    """
    found = []
    for _, name, form, conversion in string.Formatter().parse(template):
        if name is not None:
            if not name.strip() or form or conversion:
                raise ValueError("its braces hold something other than the name of a field")
            found.append(name)
    if not found:
        raise ValueError("it names no field")
    return found


def wanted(spec: Mapping[str, Any], default: str) -> list[str]:
    """The distinct fields to read for the documents of a spec; `default` is the text's field if the spec names none."""
    of_text = names(spec["text"]) if "text" in spec else [spec.get("field", default)]
    language = ["language"] if "transform" in spec and "language" not in spec else []
    return list(dict.fromkeys([*of_text, *spec.get("where", ()), *language, *spec.get(BESIDE, ())]))


def lacking(present: Callable[[str], bool], spec: Mapping[str, Any], default: str) -> str | None:
    """Why no record with these fields can give a document; None if one may."""
    for name in spec.get("where", ()):
        if not present(name):
            return _LACKING.format(name)
    for name in names(spec["text"]) if "text" in spec else [spec.get("field", default)]:
        if not present(name):
            return _TEXTLESS.format(name)
    return None


def named(has: Sequence[str]) -> str:
    """The fields of a record, for messages."""
    return f"whose fields are {', '.join(map(repr, has[:5])) or 'none'}" + ", ..." * (len(has) > 5)


def found(place: str, record: Mapping[str, Any] | Lost, spec: Mapping[str, Any], default: str = "text") -> Found:
    """The document that a record holds, or why there is none.

    Args:
      place: the record's place, for messages.
      spec: a corpus's spec, of which `field` or `text`, `where` and `licenses` are used.
      default: the text's field if `spec` names none.
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
    """The value if it is a non-empty text, else None."""
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
    """Why a record is not taken; None if it is."""
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
    """Converts values of formats with their own types to JSON types."""
    if hasattr(asked, "tolist"):  # NumPy
        asked = asked.tolist()
    if isinstance(asked, bytes):
        return asked.decode(errors="surrogateescape")
    if isinstance(asked, datetime.date | datetime.datetime):
        return asked.isoformat()
    if isinstance(asked, decimal.Decimal):
        return float(asked)
    return asked


def wrong_where(where: Any) -> str | None:
    """Why the option `where` is invalid; None if it is valid."""
    if not isinstance(where, Mapping) or not where or not all(isinstance(name, str) and name for name in where):
        return "must be a mapping from fields to conditions, such as {'language': ['Python'], 'score': {'at_least': 3}}"
    for name, condition in where.items():
        if isinstance(condition, Mapping):
            if not condition or set(condition) - {*_BOUNDS}:
                return f"has the condition {dict(condition)!r} for {name!r}; give 'at_least', 'at_most' or both"
            if not all(_is_scalar(limit) and not isinstance(limit, bool) for limit in condition.values()):
                return f"has a bound for {name!r} that is neither a number nor a text: {dict(condition)!r}"
        elif isinstance(condition, list | tuple):
            if not condition or not all(map(_is_scalar, condition)):
                return f"has a list for {name!r} that holds more than texts and numbers: {condition!r}"
        elif not _is_scalar(condition):
            return f"has the condition {condition!r} for {name!r}; give a value, a list of values, or bounds"
    return None


def _is_scalar(given: Any) -> bool:
    return isinstance(given, str | bool) or (isinstance(given, int | float) and math.isfinite(given))


def wrong_template(template: Any) -> str | None:
    """Why the option `text` is invalid; None if it is valid."""
    try:
        if isinstance(template, str) and names(template):
            return None
        reason = f"found {template!r}"
    except ValueError as error:
        reason = f"of {template!r} {error}"
    return f"must be a template of fields such as '{{title}}\\n\\n{{body}}'; {reason}"
