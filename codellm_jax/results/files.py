"""The two files of a result: TASK.json, and TASK.jsonl with a header and a line for each question."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath


def files_of(folder: epath.Path, *suffixes: str) -> list[epath.Path]:
    """The files in a folder whose names end so, sorted; none where there is no folder. The folder's own name is no
    pattern, as it would be for glob.
    """
    return sorted(path for path in (folder.iterdir() if folder.exists() else ()) if path.suffix in suffixes)


def as_lines(values: Sequence[Any]) -> str:
    """JSON, a line each; it may hold what `encoded` alone can write."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def encoded(text: str) -> bytes:
    """UTF-8, whatever the locale. A lone surrogate, which UTF-8 cannot hold, becomes its escape, "\\udc80", which JSON
    reads as that surrogate again.
    """
    return text.encode("utf-8", "backslashreplace")


def lines_written(path: epath.Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of an evaluation under this very header, as far as it came; a kill may have cut the last one short."""
    lines = []
    # A kill may cut a character too; and U+2028 and its like stand in texts as they are, where `splitlines` splits.
    for text in path.read_bytes().decode(errors="replace").split("\n") if path.exists() else []:
        if not text:
            continue
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines[1:] if lines and lines[0] == header else []


def finished_lines(path: epath.Path, result: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The lines of TASK.jsonl, without its header, where they are those of TASK.json; else None.

    Nor are they where a result tells of ties and its lines do not: earlier versions took the first of those that tie.
    """
    header = {key: result.get(key) for key in ("settings", "checkpoint")}
    lines = lines_written(path, header)
    ties = sum(bool(line.get("tied")) for line in lines)
    return lines if len(lines) == result["n"] and ties == result.get("ties", 0) else None


def write_result(
    folder: epath.Path, name: str, header: Mapping[str, Any], lines: Sequence[Any], result: Mapping[str, Any]
) -> None:
    """Both files of a task, the lines first."""
    write_whole(folder / f"{name}.jsonl", as_lines([header, *lines]))
    write_whole(folder / f"{name}.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def write_whole(path: epath.Path, text: str) -> None:
    """Whole or not at all, as UTF-8; see `encoded`."""
    building = path.with_name(f".{path.name}.building")
    building.write_bytes(encoded(text))
    building.replace(path)
