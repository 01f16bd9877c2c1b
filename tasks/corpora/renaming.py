"""New names for the names of a file, whatever its language.

A name that begins with two underscores keeps them: within classes of Python it is another name than without.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

# From the occurrences of names, in their order, and the names that stay, to as many new names.
Naming = Callable[[Sequence[str], set[str]], list[str]]


def consistent_names(occurrences: Sequence[str], taken: set[str]) -> list[str]:
    """v0, v1 ... in the order in which names come first; the same name is the same again."""
    numbers, found = _free(taken), dict[str, str]()
    for name in occurrences:
        if name not in found:
            found[name] = _new(name, next(numbers))
    return [found[name] for name in occurrences]


def random_names(occurrences: Sequence[str], taken: set[str], dice: random.Random) -> list[str]:
    """The same names, but each occurrence has one of its own, in random order."""
    numbers = list(itertools.islice(_free(taken), len(occurrences)))
    dice.shuffle(numbers)
    return [_new(name, number) for name, number in zip(occurrences, numbers, strict=True)]


def _new(name: str, number: int) -> str:
    return f"{'__' if name.startswith('__') else ''}v{number}"


def _free(taken: set[str]) -> Iterator[int]:
    return (number for number in itertools.count() if not {f"v{number}", f"__v{number}"} & taken)
