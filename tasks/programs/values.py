"""Plain values as JSON: how an untrusted program's results reach the process that judges them.

Nothing of the program's own crosses, so that no `__eq__` of its making is ever asked.
"""

import collections
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

_LONGEST_ITERATION = 1_000_000
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset,
                                                     "deque": collections.deque, "iterator": iter}


class Foreign:
    """Stands for a value that is no plain data: equal to nothing else, true or false as the value was."""

    def __init__(self, name: str, truth: bool, items: list[Any] | None) -> None:
        self._name, self._truth, self._items = name, truth, items

    def __bool__(self) -> bool:
        return self._truth

    def __iter__(self) -> Iterator[Any]:
        if self._items is None:
            raise TypeError(f"{self._name!r} object is not iterable")
        return iter(self._items)

    def __len__(self) -> int:
        if self._items is None:
            raise TypeError(f"object of type {self._name!r} has no len()")
        return len(self._items)

    def __repr__(self) -> str:
        return f"<{self._name}>"


def encode(value: Any) -> Any:
    """What json.dumps can write. Subclasses of plain types become plain: a named tuple a tuple, a Counter a dict.

    Types kept: None, bool, int, float, complex, str, bytes, bytearray, range, list, tuple, set, frozenset, deque,
    dict, Decimal, Fraction; dictionaries' keys and items become sets, iterators are run to their end (at most
    1,000,000 items). Anything else keeps its truth, its type's name and, if it can be iterated over, its items.

    Raises:
      RecursionError: a value nested too deeply, or that holds itself.
    """
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else ["int", hex(value)]  # Python reads few decimal digits
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, range):
        return ["range", *map(encode, (value.start, value.stop, value.step))]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(item)] for key, item in value.items())]
    for kind in (list, tuple, set, frozenset, collections.deque):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, value)]
    if isinstance(value, type({}.keys()) | type({}.items())):
        return ["set", *map(encode, value)]
    for module, name in (("decimal", "Decimal"), ("fractions", "Fraction")):
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
            return [name, str(value)]
    if isinstance(value, Iterator):
        return ["iterator", *map(encode, itertools.islice(value, _LONGEST_ITERATION))]
    items = None
    if hasattr(type(value), "__iter__"):
        items = [encode(item) for item in itertools.islice(value, _LONGEST_ITERATION)]
    return ["object", type(value).__name__, bool(value), items]


def decode(data: Any) -> Any:
    """The value of what `encode` made, from builtin types and `Foreign` only, whoever wrote `data`.

    Raises:
      ValueError, TypeError, RecursionError, ArithmeticError: `encode` never made this.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    kind, *parts = data
    if kind == "dict":
        return {decode(key): decode(item) for key, item in parts}
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([decode(part) for part in parts])
    if kind == "int":
        return int(parts[0], 16)
    if kind == "complex":
        return complex(*parts)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray).fromhex(parts[0])
    if kind == "range":
        return range(*map(decode, parts))
    if kind == "object":
        name, truth, items = parts
        return Foreign(str(name), bool(truth), None if items is None else [decode(item) for item in items])
    if kind == "Decimal":
        import decimal
        return decimal.Decimal(parts[0])
    if kind == "Fraction":
        import fractions
        return fractions.Fraction(parts[0])
    raise ValueError("no value")
