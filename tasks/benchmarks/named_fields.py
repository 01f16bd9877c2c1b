"""Reads the records of a question file by this package's field names; errors name the record's place."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codellm_jax.contents import BrokenFile, head, without_compression
from tasks.benchmarks.question_files import OUR_FIELDS, QuestionFile
from tasks.corpora.columns import parquet_records
from tasks.corpora.files import Lost
from tasks.corpora.records import placed_records
from tasks.corpora.separated import separated_records


@dataclasses.dataclass(frozen=True)
class Record:
    """A record of a question file.

    Attributes:
      of: the file.
      place: such as "questions.jsonl, line 3".
      values: the file's own fields.
    """

    of: QuestionFile
    place: str
    values: Mapping[str, Any]

    def fault(self, what: str) -> ValueError:
        """An error about the record, to be raised."""
        return ValueError(f"{self.place}: {what}")

    def get(self, field: str) -> Any:
        """The value of a field; None if there is none."""
        names = self.of.fields.get(field, field)
        if isinstance(names, str):
            return self._named(names)
        values = [self._named(name) for name in names]
        while values and values[-1] in (None, ""):
            values.pop()
        return values or None

    def _named(self, path: str) -> Any:
        return self.values[path] if path in self.values else _at(self.values, path.split("."))

    def value(self, field: str) -> Any:
        """The value of a required field."""
        value = self.get(field)
        if value is None:
            found = ", ".join(map(repr, self.values)) or "no fields"
            option = f"'fields': {{{field!r}: ...}}"
            raise self.fault(f"there is no {self._name(field)!r}, only {found}; if the {field} has another name, set "
                             f"{self.of.setting(option)}.")
        return value

    def text(self, field: str) -> str:
        """The text of a required field."""
        return self.as_text(field, self.value(field))

    def optional(self, field: str) -> Any:
        """The value of a field, which is required only if `fields` names it; None if it is missing."""
        return self.value(field) if field in self.of.fields else self.get(field)

    def as_text(self, field: str, value: Any, numbers: bool = False) -> str:
        """A field's value, which must be text and not blank; with `numbers`, a number is accepted as text."""
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise self.fault(f"{self._name(field)!r} must hold text, found {shown(value)}.")
        if not value.strip():
            raise self.fault(f"{self._name(field)!r} is empty.")
        return value

    def own_id(self, number: int) -> str:
        """The record's `id` or `task_id`, else its number in the file."""
        value = self.optional("id")
        value = self.get("task_id") if value is None else value
        return str(number) if value is None else self.as_text("id", value, numbers=True)

    def for_templates(self) -> dict[str, str]:
        """The question, and the further fields that `fields` adds."""
        own = {field: self.text(field) for field in self.of.fields if field not in OUR_FIELDS}
        return {"question": self.text("question"), **own}

    def passage(self) -> dict[str, str]:
        """The fields of the passage, which may be missing or empty."""
        value = self.optional("passage")
        if value is not None and not isinstance(value, str):
            raise self.fault(f"{self._name('passage')!r} must hold text, found {shown(value)}.")
        return {"passage": value or "", "passage_line": f"{value}\n" if value else ""}

    def _name(self, field: str) -> str:
        names = self.of.fields.get(field, field)
        return names if isinstance(names, str) else ", ".join(names)


def records(of: QuestionFile, path: str) -> Iterator[Record]:
    """Yields the records of a file in order.

    Raises:
      ValueError: one line; an entry of the file is not a record, or the file holds none.
      OSError: one line; the file cannot be read.
    """
    is_empty = True
    wanted = "a JSON object in each line, in UTF-8"
    found: Iterator[tuple[str, Mapping[str, Any] | Lost]] = placed_records(path)
    if head(path).startswith(b"PAR1"):
        found, wanted = parquet_records(path, None), "a question in each row of Parquet"
    elif without_compression(path).lower().endswith((".csv", ".tsv", ".tab")):
        found, wanted = separated_records(path, {}), "names in its first row and a question in each other"
    try:
        for place, record in found:
            if isinstance(record, Lost):
                raise ValueError(f"{place or path}: {record.reason}; a file of questions holds {wanted}.")
            is_empty = False
            yield Record(of, place, record)
    except BrokenFile as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); copy or download it again.") from error
    if is_empty:
        raise ValueError(f"{path} holds no questions.")


def shown(value: Any) -> str:
    """A value for messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _at(value: Any, path: Sequence[str]) -> Any:
    """The value at the end of a path of names, mapped over lists on the way; None if there is none."""
    if not path:
        return value
    if isinstance(value, list):
        found = [_at(one, path) for one in value]
        return None if None in found else found
    return _at(value[path[0]], path[1:]) if isinstance(value, Mapping) and path[0] in value else None
