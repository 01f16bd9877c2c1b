"""Encodes values as JSON, to pass an untrusted program's results to the process that judges them.

Plain data crosses unchanged and is compared there as types of the standard library. The program's own objects remain in
its process and cross as numbers; none of their `__eq__` methods decides about an expected value.
"""

import builtins
import importlib
import math
import operator
import re
import sys
from collections.abc import Callable, ItemsView, Iterator, KeysView
from types import FunctionType, GeneratorType, SimpleNamespace
from typing import Any

Keep = Callable[[Any], int]  # returns the number of an object that does not cross
Named = Callable[[int, str, bool], Any]  # returns the proxy for a number, a builtin class and whether it is an iterator

# Types of the standard library that are rebuilt from parts; subclasses before their bases.
_MADE: dict[str, Callable[[Any], Any]] = {
    "collections.Counter": lambda value: [dict(value)],
    "collections.OrderedDict": lambda value: [list(value.items())],
    "collections.defaultdict": lambda value: [_builtin_type(value.default_factory), dict(value)],
    "collections.deque": lambda value: [list(value), value.maxlen],
    "collections.ChainMap": lambda value: value.maps,
    "collections.UserDict": lambda value: [value.data],
    "collections.UserList": lambda value: [value.data],
    "collections.UserString": lambda value: [value.data],
    "types.MappingProxyType": lambda value: [dict(value)],
    "types.SimpleNamespace": lambda value: [vars(value)],
    "builtins.slice": lambda value: [value.start, value.stop, value.step],
    "builtins.range": lambda value: [value.start, value.stop, value.step],
    "builtins.complex": lambda value: [value.real, value.imag],
    "array.array": lambda value: [value.typecode, value.tolist()],
    "decimal.Decimal": lambda value: [str(value)],
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
    "datetime.datetime": lambda value: [
        value.year, value.month, value.day, value.hour, value.minute, value.second, value.microsecond, _zone(value)],
    "datetime.date": lambda value: [value.year, value.month, value.day],
    "datetime.time": lambda value: [value.hour, value.minute, value.second, value.microsecond, _zone(value)],
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
    "datetime.timezone": lambda value: [value.utcoffset(None)],
    "pathlib.PosixPath": lambda value: [str(value)],
    "pathlib.PurePosixPath": lambda value: [str(value)],
    "pathlib.PureWindowsPath": lambda value: [str(value)],
    "re.Pattern": lambda value: [value.pattern, value.flags],
    "uuid.UUID": lambda value: [str(value)],
    **{f"ipaddress.IPv{version}{kind}": lambda value: [str(value)]
       for version in (4, 6) for kind in ("Interface", "Address", "Network")},
}
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list, "tuple": tuple, "set": set, "frozenset": frozenset,
    "keys": lambda items: dict.fromkeys(items).keys(), "items": lambda items: dict(items).items()}
_PLAIN = frozenset({dict, list, tuple, set, frozenset})
_CLASSES = {"function": FunctionType, "generator": GeneratorType}  # types without a name in builtins
_SINGLES: dict[str, Any] = {"Ellipsis": ..., "NotImplemented": NotImplemented, "math.nan": math.nan}


def _builtin_type(value: Any) -> Any:
    return value if getattr(builtins, getattr(value, "__name__", ""), None) is value else None


def _zone(value: Any) -> Any:
    """A fixed zone with a time's UTC offset, which decides comparisons."""
    offset = value.utcoffset()
    return None if offset is None else sys.modules["datetime"].timezone(offset)


def encode(value: Any, keep: Keep) -> Any:
    """Converts a value to one that json.dumps can write.

    Plain data and the types of `_MADE` cross with their content, as their nearest such type: a named tuple as a tuple,
    a member of an IntEnum as an int. Builtin classes cross by name, other objects as numbers.

    Raises:
      RecursionError: a value nests too deeply, or contains itself.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        if value == value:
            return value
        return ["single", "math.nan"] if value is math.nan else ["nan", keep(value)]
    if isinstance(value, int):
        return int(value) if abs(value) < 1 << 63 else ["int", hex(value)]  # Python limits decimal digits
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
    if isinstance(value, memoryview) and value.format == "B":
        return ["memoryview", value.tobytes().hex()]
    if type(value) in (Foreign, ForeignIterator):
        return ["object", keep(value), "", False]
    for name, parts in _MADE.items() if type(value) not in _PLAIN else ():
        module, _, own = name.partition(".")
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], own)):
            return ["made", name, *(encode(part, keep) for part in parts(value))]
    if isinstance(value, dict):
        return ["dict", *([encode(key, keep), encode(item, keep)] for key, item in value.items())]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *(encode(part, keep) for part in value)]
    if isinstance(value, KeysView | ItemsView):
        return ["keys" if isinstance(value, KeysView) else "items", *(encode(part, keep) for part in value)]
    if isinstance(value, type) and _builtin_type(value) and value is not type:  # `type` can create classes
        return ["type", value.__name__]
    for name, single in _SINGLES.items():
        if value is single:
            return ["single", name]
    base = next(base for base in type(value).__mro__ if _builtin_type(base) or base in _CLASSES.values())
    return ["object", keep(value), base.__name__, isinstance(value, Iterator)]


def decode(data: Any, named: Named) -> Any:
    """Inverts `encode`; makes only standard library types, even if `data` is forged.

    Args:
      data: a result of json.loads.
      named: returns the proxy of an object that crossed as a number.

    Raises:
      ValueError, TypeError, RecursionError, ArithmeticError, LookupError: `encode` cannot have made this.
    """
    if data is None or isinstance(data, bool | int | float | str):
        return data
    kind, *parts = data
    if kind == "dict":
        return {decode(key, named): decode(item, named) for key, item in parts}
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([decode(part, named) for part in parts])
    if kind == "int":
        return int(parts[0], 16)
    if kind in ("bytes", "bytearray"):
        return (bytes if kind == "bytes" else bytearray).fromhex(parts[0])
    if kind == "memoryview":
        return memoryview(bytes.fromhex(parts[0]))
    if kind == "made" and parts[0] in _MADE:
        name, *rest = parts
        module, _, own = name.partition(".")
        values = [decode(part, named) for part in rest]
        if name == "types.SimpleNamespace":
            return SimpleNamespace(**values[0])
        return re.compile(*values) if name == "re.Pattern" else getattr(importlib.import_module(module), own)(*values)
    if kind == "type" and isinstance(found := getattr(builtins, parts[0]), type) and found is not type:
        return found
    if kind == "single":
        return _SINGLES[parts[0]]
    if kind == "nan":
        return named(int(parts[0]), "float", False)
    if kind == "object":
        return named(int(parts[0]), str(parts[1]), bool(parts[2]))
    raise ValueError("no value")


class Kept:
    """The objects in the program's process that its judge knows by number, and the operations on them."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._raise_next: dict[int, BaseException] = {}

    def number(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)  # a reference also keeps its id from being reused
        return number

    def named(self, number: int, base: str, iterates: bool) -> Any:
        return float("nan") if number < 0 else self._objects[number]

    def use(self, how: str, number: int, *arguments: Any) -> Any:
        """Performs an operation that a `Foreign` requests; raises the object's exceptions."""
        value = self._objects[number]
        if how == "next":
            return self._next(number, *arguments)
        uses: dict[str, Callable[..., Any]] = {
            "bool": bool, "str": str, "repr": repr, "len": len, "iter": iter, "hash": hash, "int": int, "float": float,
            "getattr": getattr, "getitem": operator.getitem, "eq": operator.eq, "lt": operator.lt, "le": operator.le,
            "gt": operator.gt, "ge": operator.ge, "call": lambda value, values, named: value(*values, **named)}
        return uses[how](value, *arguments)

    def _next(self, number: int, count: int) -> list[Any]:
        """One to `count` items; an exception after the first item is raised at the next request."""
        if number in self._raise_next:
            raise self._raise_next.pop(number)
        items = [next(self._objects[number])]
        try:
            while len(items) < count:
                items.append(next(self._objects[number]))
        except BaseException as error:
            self._raise_next[number] = error
        return items


class Known:
    """The proxies of a program's objects in its judge's process, one per number."""

    def __init__(self, ask: Callable[..., Any]) -> None:
        self._ask = ask
        self._known: dict[int, Any] = {}

    def named(self, number: int, base: str, iterates: bool) -> Any:
        if number not in self._known:
            kind = ForeignIterator if iterates else Foreign
            self._known[number] = float("nan") if base == "float" else kind(self._ask, number, base)
        return self._known[number]

    def number(self, value: Any) -> int:
        for number, known in self._known.items():
            if known is value:
                return number
        if type(value) is float:
            return -1  # a NaN of the tests themselves
        raise TypeError(f"a test gives the program an object of {type(value)}, which is not plain data")


class Foreign:
    """A proxy of a program's own object, which compares only with other such objects.

    Its text, length, items, attributes and results are requested from the program, which could as well return them as
    data.
    """

    def __init__(self, ask: Callable[..., Any], number: int, base: str) -> None:
        self._ask, self._number, self._base = ask, number, base

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # used by isinstance() with a builtin class
        found = _CLASSES.get(self._base) or getattr(builtins, self._base, object)
        return found if isinstance(found, type) and found is not object else Foreign

    def __eq__(self, other: object) -> Any:
        return self._compared("eq", other)

    def __lt__(self, other: object) -> Any:
        return self._compared("lt", other)

    def __le__(self, other: object) -> Any:
        return self._compared("le", other)

    def __gt__(self, other: object) -> Any:
        return self._compared("gt", other)

    def __ge__(self, other: object) -> Any:
        return self._compared("ge", other)

    def __hash__(self) -> int:
        return hash(self._use("hash"))

    def __bool__(self) -> bool:
        return bool(self._use("bool"))

    def __str__(self) -> str:
        return str(self._use("str"))

    def __repr__(self) -> str:
        return str(self._use("repr"))

    def __int__(self) -> int:
        return int(self._use("int"))

    def __float__(self) -> float:
        return float(self._use("float"))

    def __len__(self) -> int:
        return int(self._use("len"))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._use("iter"))

    def __getitem__(self, key: Any) -> Any:
        return self._use("getitem", key)

    def __getattr__(self, name: str) -> Any:
        return self._use("getattr", name)

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self._use("call", values, named)

    def _compared(self, how: str, other: object) -> Any:
        return self._use(how, other) if type(other) in (Foreign, ForeignIterator) else NotImplemented

    def _use(self, how: str, *arguments: Any) -> Any:
        return self._ask(how, self._number, *arguments)


class ForeignIterator(Foreign):
    """A proxy of a program's iterator; requests one item at a time, from the hundredth on several."""

    def __init__(self, ask: Callable[..., Any], number: int, base: str) -> None:
        super().__init__(ask, number, base)
        self._waiting: list[Any] = []
        self._taken = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._waiting:
            self._waiting = self._use("next", 1 if self._taken < 100 else min(self._taken, 10_000))[::-1]
        self._taken += 1
        return self._waiting.pop()
