"""New names for the names of a file in any language.

A name that begins with two underscores keeps them, because Python classes mangle such names.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

# Maps the occurrences of names, in order, and the names to be kept, to a new name for each occurrence.
Naming = Callable[[Sequence[str], set[str]], list[str]]


def consistent_names(occurrences: Sequence[str], taken: set[str]) -> list[str]:
    """v0, v1 ... in order of first occurrence; equal names remain equal."""
    numbers, found = _free(taken), dict[str, str]()
    for name in occurrences:
        if name not in found:
            found[name] = _new(name, next(numbers))
    return [found[name] for name in occurrences]


def random_names(occurrences: Sequence[str], taken: set[str], dice: random.Random) -> list[str]:
    """The same names as `consistent_names`, but a different one for each occurrence, in random order."""
    numbers = list(itertools.islice(_free(taken), len(occurrences)))
    dice.shuffle(numbers)
    return [_new(name, number) for name, number in zip(occurrences, numbers, strict=True)]


def _new(name: str, number: int) -> str:
    return f"{'__' if name.startswith('__') else ''}v{number}"


def _free(taken: set[str]) -> Iterator[int]:
    return (number for number in itertools.count() if not {f"v{number}", f"__v{number}"} & taken)
