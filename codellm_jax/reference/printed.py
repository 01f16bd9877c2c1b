"""`t5x settings [WORD]` and `t5x list [KIND]`: the reference as text in a terminal."""

import difflib
import textwrap

from codellm_jax.reference.registries import REGISTRIES
from codellm_jax.reference.settings import Documented, settings

WIDTH = 110
NEAREST = 3


def settings_page(word: str | None) -> str:
    """Every setting, or those that have a word in their name or meaning, with type, default and where it stands.

    Macros, which files and flags set by a bare name, come before the parameters that they are the values of.

    Raises:
      ValueError: no setting has the word; names that are like it are told.
    """
    known = settings()
    if word is None:
        width = max(len(one.name) for one in known)
        lines = [f"{one.name:<{width}}  {_first_sentence(one)}" for one in known]
        return "\n".join([*lines, "", f"{len(known)} settings. All about one of them: t5x settings NAME. Those that an "
                          "arm sets: t5x explain --gin_file=FILE"])
    exact = [one for one in known if word.lower() in (one.name.lower(), one.name.lower().rpartition(".")[2])]
    found = exact or [one for one in known if word.lower() in one.name.lower()] or [
        one for one in known if word.lower() in one.meaning.lower()]
    if not found:
        by_word: dict[str, list[str]] = {}
        for one in known:
            for name in {one.name.lower(), one.name.lower().rpartition(".")[2]}:
                by_word.setdefault(name, []).append(one.name)
        close = difflib.get_close_matches(word.lower(), by_word, NEAREST, 0.5)
        near = list(dict.fromkeys(name for each in close for name in by_word[each]))[:NEAREST]
        raise ValueError(f"no setting is named {word!r} or speaks of it" + (
            f"; nearest: {', '.join(near)}." if near else "; t5x settings lists all."))
    return "\n\n".join(map(_described, found))


def _described(one: Documented) -> str:
    """A setting with all that is known of it."""
    default = f", {one.default} by default" if one.default is not None else "" if one.is_macro else ", has no default"
    lines = [f"{one.name}  ({one.type or 'any type'}{default})", *textwrap.wrap(
        one.meaning, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    if one.bound:
        lines.append(f"  {'value of' if one.is_macro else 'set by'} {', '.join(one.bound)}")
    values: dict[str, list[str]] = {}
    for place, value in one.files:
        if value.removeprefix("%") not in one.bound:
            values.setdefault(value, []).append(place)
    lines += textwrap.wrap("; ".join(f"{value} in {', '.join(places)}" for value, places in values.items()), WIDTH,
                           initial_indent="  stands as ", subsequent_indent="    ") if values else []
    return "\n".join([*lines, f"  taken by {one.defined.replace(':', '.')}"])


def _first_sentence(one: Documented) -> str:
    text = one.meaning.split(". ")[0]
    return textwrap.shorten(text, WIDTH - 30, placeholder=" ...")


def listing(kind: str | None) -> str:
    """What there is of a kind, such as models or corpora, each with what it is; without a kind, the kinds.

    Raises:
      ValueError: there is no such kind.
    """
    if kind is None:
        width = max(map(len, REGISTRIES))
        return "\n".join([f"{name:<{width}}  {registry.title}: {registry.use}" for name, registry in REGISTRIES.items()]
                         + ["", "One of them: t5x list KIND"])
    if kind not in REGISTRIES:
        near = difflib.get_close_matches(kind, REGISTRIES, 1, 0.4)
        raise ValueError(f"nothing of the kind {kind!r} is listed; " + (
            f"nearest: {near[0]}." if near else f"there are {', '.join(REGISTRIES)}."))
    registry = REGISTRIES[kind]
    entries = registry.entries()
    width = min(34, max(len(entry.name) for entry in entries))
    lines = [f"{registry.title}: {registry.use}", ""]
    for entry in entries:
        text = entry.description + (f" {registry.options.capitalize()}: {', '.join(entry.options)}."
                                    if entry.options else "")
        wrapped = textwrap.wrap(text, WIDTH - width, break_on_hyphens=False) or [""]
        lines += [f"{entry.name:<{width}}  {wrapped[0]}", *(f"{'':<{width}}  {line}" for line in wrapped[1:])]
    return "\n".join(lines)
