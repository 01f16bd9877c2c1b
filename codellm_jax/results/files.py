"""Files that commands write and later commands read: JSON objects, and the two files of a result, TASK.json and
TASK.jsonl with a header and a line for each question. TASK.json and each line have a digest of the rest, so that damage
is noticed; earlier versions wrote none.
"""

import contextlib
import hashlib
import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath


class Damaged(ValueError):
    """A file written by an earlier command is invalid; the message names it."""


Members = Mapping[str, type | tuple[type, ...]]
_NUMBER = (int, float)
# The members of a run's provenance.json, and of the ledger in it; see `runtime.provenance`.
PROVENANCE: Members = {
    "asked": dict, "order": str, "ledger": dict, "sessions": list, "step": int, "last_step": int, "finished": bool,
    "data": dict, "checkpoint": (str, type(None)), "kept": dict, "arm": str, "seed": (int, type(None)),
    "parameters": _NUMBER, "notes": list, "devices": dict, "versions": dict, "code": dict, "config_hash": str,
    "prepared": dict}
LEDGER: Members = {"stage": str, "rows": dict, "tokens": dict, "phases": list, "before": list, "model_dir": str,
                   "branch": (dict, type(None)), "epoch_rows": dict}
# The members of an evaluation's TASK.json that others read.
RESULT: Members = {
    "task": str, "n": int, "settings": dict, "checkpoint": dict, "metric": str, "sample": bool, "value": _NUMBER,
    "interval": (list, type(None)), "measured": bool, "ties": int, "measures": dict, "scores": dict,
    "provenance": dict}
# What study.json says of a run.
ENTRY: Members = {
    "run": str, "arm": str, "seed": (int, type(None)), "stage": str, "kind": str, "from": (str, type(None)),
    "mix": (str, type(None)), "steps": int}


def read_object(path: epath.Path, members: Members, required: Collection[str] = ()) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no file.

    Args:
      path: of the file.
      members: types of values by their names.
      required: names that must be present.

    Raises:
      Damaged: with a one-line message; the file contains something else.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: it is not JSON ({' '.join(str(error).split())[:100]}).") from None
    require_members(found, members, required, str(path))
    return found


def require_members(found: Any, members: Members, required: Collection[str], what: str) -> None:
    """Raises Damaged if `found` is not an object, lacks a name, or has a value of another type."""
    if not isinstance(found, dict):
        raise Damaged(f"{what} is damaged: it holds no JSON object.")
    for name in required:
        if name not in found:
            raise Damaged(f"{what} is damaged: it has no {name!r}.")
    for name, kind in members.items():
        value = found.get(name)
        if name in found and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise Damaged(f"{what} is damaged: {name!r} is {' '.join(repr(value).split())[:60]}.")


def require_plain_runs(path: epath.Path, entries: Iterable[Any]) -> None:
    """Raises Damaged if study.json names a run that is not a folder below `runs`, or holds what no plan has."""
    for entry in entries:
        require_members(entry, ENTRY, ("run",), str(path))
        if entry["run"] in ("", ".", "..") or set(entry["run"]) & set("/\\\0\n"):
            raise Damaged(f"{path} is damaged: it names the run {entry['run']!r}.")


def read_provenance(
    run: epath.Path, required: Collection[str] = (), of_ledger: Collection[str] = ()
) -> dict[str, Any] | None:
    """The content of provenance.json in a run directory; None if there is none.

    Args:
      run: the directory.
      required: names that must be present.
      of_ledger: names that must be present in the ledger of each stage.

    Raises:
      Damaged: with a one-line message; the file is not what a run writes.
    """
    path = run / "provenance.json"
    found = read_object(path, PROVENANCE, required)
    for session in (found or {}).get("sessions", ()):
        require_members(session, {"seconds": (int, float, type(None))}, ("seconds",), f"{path}, in a session,")
    ledger = (found or {}).get("ledger")
    for stage in [] if ledger is None else [ledger, *ledger.get("before", ())]:
        require_members(stage, LEDGER, of_ledger, f"{path}, in its ledger,")
        for phase in stage.get("phases", ()):
            require_members(phase, {"start": int, "rows": dict}, ("rows",), f"{path}, in a phase of its ledger,")
        for counts in (stage.get("rows", {}), stage.get("tokens", {}), stage.get("epoch_rows", {}),
                       *(phase["rows"] for phase in stage.get("phases", ()))):
            require_members(counts, dict.fromkeys(counts, int), (), f"{path}, in its ledger,")
    return found


def files_of(folder: epath.Path, *suffixes: str) -> list[epath.Path]:
    """The files in a folder whose names have one of these suffixes, sorted; none if there is no folder. Unlike with
    glob, the folder's own name is not a pattern.
    """
    return sorted(path for path in (folder.iterdir() if folder.exists() else ()) if path.suffix in suffixes)


def digest(record: Mapping[str, Any]) -> str:
    """A hash of everything else in a record."""
    text = json.dumps({key: value for key, value in record.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _with_digest(value: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(value))  # as it will be read: keys are texts
    return plain | {"digest": digest(plain)}


def as_lines(values: Iterable[Mapping[str, Any]]) -> str:
    """JSON, one value per line, each with its digest; may contain text that only `encoded` can write."""
    return "".join(json.dumps(_with_digest(value), ensure_ascii=False) + "\n" for value in values)


def encoded(text: str) -> bytes:
    """UTF-8, whatever the locale. A lone surrogate, which UTF-8 cannot represent, becomes its escape, "\\udc80", which
    JSON reads as that surrogate again.
    """
    return text.encode("utf-8", "backslashreplace")


def lines_written(path: epath.Path, header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines of an interrupted evaluation with exactly this header, up to the first one that a kill truncated or
    that is damaged.
    """
    lines: list[dict[str, Any]] = []
    have_digests = False
    # A kill may also truncate a character; and texts contain U+2028 and similar unescaped, where `splitlines` would
    # split.
    for text in path.read_bytes().decode(errors="replace").split("\n") if path.exists() else []:
        if not text:
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict):
            break
        found = line.pop("digest", None)
        have_digests = have_digests if lines else found is not None
        if have_digests and found != digest(line):
            break
        lines.append(line)
    return lines[1:] if lines and lines[0] == header else []


def finished_lines(path: epath.Path, result: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The lines of TASK.jsonl, without its header, if they match TASK.json; else None.

    They do not match if a result has ties but its lines do not: earlier versions chose the first of tied candidates.
    """
    header = {key: result.get(key) for key in ("settings", "checkpoint")}
    lines = lines_written(path, header)
    ties = sum(bool(line.get("tied")) for line in lines)
    return lines if len(lines) == result["n"] and ties == result.get("ties", 0) else None


def read_result(path: epath.Path, required: Collection[str] = ("task", "n", "settings")) -> dict[str, Any]:
    """The content of TASK.json. Raises Damaged with a one-line message."""
    found = read_object(path, RESULT, ("checkpoint", *required))
    if found is None:
        raise Damaged(f"{path} is gone.")
    if found.pop("digest", None) not in (None, digest(found)):
        raise Damaged(f"{path} is damaged: it differs from what was written.")
    return found


def write_result(
    folder: epath.Path, name: str, header: Mapping[str, Any], lines: Sequence[Any], result: Mapping[str, Any]
) -> None:
    """Writes both files of a task, the lines first."""
    write_whole(folder / f"{name}.jsonl", as_lines([header, *lines]))
    write_whole(folder / f"{name}.json", json.dumps(_with_digest(result), indent=2, ensure_ascii=False) + "\n")


def write_whole(path: epath.Path, text: str) -> None:
    """Writes atomically, as UTF-8; see `encoded`. Of several concurrent writers, one leaves its whole file."""
    building, content = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.building"), encoded(text)
    try:
        with named(path, len(content)):
            building.write_bytes(content)
            building.replace(path)
    except BaseException:
        building.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def named(path: epath.Path, size: int) -> Iterator[None]:
    """Makes disk errors in the block name the file and the number of bytes. Raises OSError with a one-line message."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{path} cannot be written ({size:,} bytes): {error.strerror}. Fix this and run the same command "
                      "again: it continues from what is complete.") from error
