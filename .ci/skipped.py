"""Prints the tests that a JUnit file of pytest says were skipped, one a line, as pytest takes them."""

import sys
import xml.etree.ElementTree


def skipped(path: str) -> list[str]:
    """Node ids of tests, or of whole files."""
    found = {}
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is None:
            continue
        module, name = case.get("classname", ""), case.get("name", "")
        whole_file = not module  # skipped when it was imported
        file = (name if whole_file else module).replace(".", "/") + ".py"
        found[file if whole_file else f"{file}::{name}"] = None
    return list(found)


if __name__ == "__main__":
    print(*skipped(sys.argv[1]), sep="\n")
