"""Small files of a published folder, whose authors are strangers: where they may lie, their largest size, their JSON.

A file counts only if it is a regular file in its folder. Links are followed within the folder, and in the cache of a
hub from a snapshot to the same repository's blobs; a link that leads elsewhere could copy any file of this machine into
a run, which is then published.
"""

import collections
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from codellm_jax import contents

# In bytes. A list of JSON takes up to 25 times its text in memory.
LARGEST_SETTINGS = 16 << 20  # of a configuration, an index or a chat template; the largest known have 5 MB
LARGEST_TOKENIZER = 64 << 20  # of a tokenizer's file; the largest known have 35 MB
DEEPEST = 100  # levels of lists and objects
LONGEST_QUOTE = 200  # characters of a file's own words in a message


def require_own(file: str, folder: str | None = None, largest: int | None = None) -> None:
    """Raises OSError or UnreadableFile, in one line, unless a file is a regular file in its folder.

    Args:
      file: its path, local or gs://.
      folder: the published folder; None for the one that holds the file.
      largest: the most bytes that it may have; None for any number.
    """
    contents.require_file(file)
    if "://" not in file:
        root, target = os.path.realpath(folder or os.path.dirname(file) or "."), os.path.realpath(file)
        above, snapshots = os.path.split(os.path.dirname(root))
        roots = (root, os.path.join(above, "blobs")) if snapshots == "snapshots" else (root,)
        if not any(target.startswith(os.path.join(one, "")) for one in roots):
            raise contents.UnreadableFile(f"{file} leads out of its folder, to {target}: put the file itself there.")
    if largest is not None and (size := contents.size(file)) > largest:
        raise contents.UnreadableFile(f"{file} has {size:,} bytes; at most {largest:,} are read.")


def text(file: str) -> str:
    """The text of a file in its folder; raises OSError and UnreadableFile with a one-line message."""
    require_own(file, largest=LARGEST_SETTINGS)

    def bounded() -> Iterator[bytes]:  # it may be compressed
        held = 0
        for piece in contents.in_utf8(file):
            if (held := held + len(piece)) > LARGEST_SETTINGS:
                raise contents.UnreadableFile(f"{file} is too large: at most {LARGEST_SETTINGS:,} bytes are read.")
            yield piece

    return contents.whole_text(file, bounded())


def json_object(file: str) -> dict[str, Any]:
    """The JSON object in a file; raises OSError and ValueError with a one-line message that names the file."""
    found = text(file)
    try:
        value = parsed(found)
    except ValueError as error:
        raise ValueError(f"{file} is {contents.kind(contents.head(file)) or f'no JSON: {error}'}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds no JSON object.")
    return value


def parsed(found: str) -> Any:
    """A value in JSON; raises ValueError, with a part of a line that says why, for what other readers may understand
    otherwise or not at all: a name that occurs twice, half a character, or too many levels.
    """
    try:
        value = json.loads(found, object_pairs_hook=_unique)
        if re.search(r"\\u[dD][89a-fA-F]", found):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it has more than {DEEPEST} levels") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds {error.object[error.start]!a}, half a character") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, dict | list)] if isinstance(value, dict | list) else []
    if level:
        raise ValueError(f"it has more than {DEEPEST} levels")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:LONGEST_QUOTE]!r} occurs twice")
    return found
