"""Records of CSV and TSV: one per row, with the names of the first row as fields.

The option `separator` sets the delimiter; by default a tab for .tsv and .tab, a comma for other names. Quoted cells
may hold line ends; `'quotes': False` treats quotes as text, as in many TSVs. For files without a header row, `columns`
gives the names. All values are text.
"""

import csv
from collections.abc import Iterator, Mapping
from typing import Any

from codellm_jax.contents import LARGEST, TOO_LARGE, UnreadableFile, lines, without_compression
from tasks.corpora import fields
from tasks.corpora.files import Lost
from tasks.corpora.records import EMPTY_FILE

LONGEST_CELL = 1 << 26  # characters; without a limit an unclosed quote would swallow the rest of a file


def separated_records(file: str, spec: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | Lost]]:
    """Yields the rows of a file as records, with their places.

    Raises:
      OSError: the file cannot be read.
      UnreadableFile: it is not text, or several of its columns have the name of a requested field.
      BrokenFile: it is truncated or damaged; raised after all readable rows.
    """
    tabs = without_compression(file).lower().endswith((".tsv", ".tab"))
    csv.field_size_limit(LONGEST_CELL)
    longer = 0

    def decoded() -> Iterator[str]:
        nonlocal longer
        for line in lines(file, LARGEST):
            longer += not line
            # Invalid UTF-8 becomes lone surrogates, which identify the affected texts.
            yield line.decode(errors="surrogateescape")

    rows = csv.reader(decoded(),
                      delimiter=spec.get("separator", "\t" if tabs else ","),
                      quoting=csv.QUOTE_MINIMAL if spec.get("quotes", True) else csv.QUOTE_NONE)
    names, number = spec.get("columns"), 0
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            number += 1
            yield f"{file}, line {rows.line_num}: {error}", Lost("broken rows")
            continue
        if row is None:
            break
        if not row:  # an empty line
            continue
        number += 1
        if names is None:
            names = row
            number = 0
            if twice := [name for name in fields.wanted(spec, "text") if names.count(name) > 1]:
                raise UnreadableFile(f"{file} has {names.count(twice[0])} columns named {twice[0]!r}; rename all but "
                                     "one, or name them all with 'columns'.")
        elif len(row) != len(names):
            yield (f"{file}, line {rows.line_num}, {len(row)} instead of {len(names)}",
                   Lost("with a number of cells that differs from the header's"))
        else:
            yield f"{file}, line {rows.line_num}", dict(zip(names, row, strict=True))
    if longer:
        yield file, Lost(TOO_LARGE, longer)
    elif not number:
        yield file, Lost(EMPTY_FILE)
