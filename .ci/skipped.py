"""Prints the tests that a JUnit file of pytest says were skipped, one a line, as pytest takes them."""

import sys
import xml.etree.ElementTree


def skipped(path: str, without: str | None) -> list[str]:
    """Node ids of tests, or of whole files; those whose reason holds the word `without` are left out."""
    found = {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        reason = case.find("skipped")
        if reason is None or without and without in f"{reason.get('message')} {reason.text}":
            continue
        module, name = case.get("classname", ""), case.get("name", "")
        whole_file = not module  # skipped when it was imported
        file = (name if whole_file else module).replace(".", "/") + ".py"
        found[file if whole_file else f"{file}::{name}"] = None
    return list(found)


if __name__ == "__main__":
    word = next((flag.removeprefix("--without=") for flag in sys.argv[2:]), None)
    print(*skipped(sys.argv[1], word), sep="\n", end="")
