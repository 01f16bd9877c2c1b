"""What MkDocs adds to the pages of docs/: the reference, made from the code; files that a page links to; the notebook;
and CONTRIBUTING, CHANGELOG and SECURITY.

In a checkout links lead from page to file, and in the site to a page that shows the file.
"""

import base64
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from codellm_jax.reference.commands import Command, Flag, commands  # noqa: E402
from codellm_jax.reference.registries import REGISTRIES, Entry, Registry  # noqa: E402
from codellm_jax.reference.settings import Documented, settings  # noqa: E402

# File of the repository -> its page.
OWN_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
             "SECURITY.md": "security.md", "docs/tutorial.ipynb": "tutorial.md"}
LANGUAGES = {".py": "python", ".gin": "text", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash"}
LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that no file of docs/ holds."""
    made = {"reference/commands.md": commands_page(commands()), "reference/settings.md": settings_page(settings()),
            "reference/names.md": names_page(REGISTRIES.items())}
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        made[OWN_PAGES[name]] = (ROOT / name).read_text(encoding="utf-8")
    page, pictures = notebook_page(json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8")))
    made["tutorial.md"] = page
    sources = {repository_path(file.src_uri): file.content_string for file in files.documentation_pages()}
    sources |= {repository_path(uri): text for uri, text in made.items()}
    for path in linked_files(sources):
        made[page_of(path)] = source_page(path)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    for uri, content in pictures.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the repository into links between pages."""
    return with_site_links(markdown, repository_path(page.file.src_uri), page.file.src_uri)


def repository_path(uri: str) -> str:
    """Where the text of a page lies in the repository; of a made one where it would lie."""
    return next((path for path, page in OWN_PAGES.items() if page == uri and path != "README.md"), f"docs/{uri}")


def page_of(path: str) -> str:
    """The page, or the file of docs/, that shows a file of the repository."""
    if path in OWN_PAGES:
        return OWN_PAGES[path]
    return path.removeprefix("docs/") if in_site(path) else f"source/{path}.md"


def in_site(path: str) -> bool:
    """Whether MkDocs puts a file of the repository into the site by itself."""
    return path.startswith("docs/") and not path.endswith(".py")


def with_site_links(markdown: str, path: str, uri: str) -> str:
    """A text whose links are relative to `path` with links that are relative to the page `uri`; code stays."""
    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), found[2]))
        link = posixpath.relpath(page_of(target), posixpath.dirname(uri) or ".")
        return f"{found[1]}{link}{found[3] or ''}{found[4]}"

    return "".join(part if number % 2 else LINK.sub(moved, part) for number, part in enumerate(_CODE.split(markdown)))


def linked_files(sources: dict[str, str]) -> list[str]:
    """Files of the repository that texts, by their paths, link to, and that have no page yet."""
    found = set()
    for path, text in sources.items():
        for number, part in enumerate(_CODE.split(text)):
            if not number % 2:
                found |= {posixpath.normpath(posixpath.join(posixpath.dirname(path), link[1]))
                          for link in LINK.findall(part)}
    return sorted(path for path in found if path not in OWN_PAGES and not in_site(path))


def source_page(path: str) -> str:
    """A page that shows a file, or names what a folder holds. Raises OSError where there is none."""
    place = ROOT / path
    if place.is_dir():
        return f"# {path}\n\n" + "".join(f"- `{path}/{name}`\n" for name in sorted(os.listdir(place)))
    text = place.read_text(encoding="utf-8").rstrip()
    return f"# {path}\n\n````{LANGUAGES.get(place.suffix, 'text')}\n{text}\n````\n"


# ---- Reference ------------------------------------------------------------------------------------


def commands_page(found: Iterable[Command]) -> str:
    """Every sub-command with its flags."""
    found = list(found)
    lines = ["# Commands", "", "This page is made from the parser, as `t5x COMMAND --help` prints it.", "",
             "| command | what it does |", "|---|---|",
             *(f"| [t5x {one.name}](#t5x-{one.name}) | {cell(one.summary)} |" for one in found), ""]
    for one in found:
        lines += [f"## t5x {one.name}", "", one.description, ""]
        if one.takes_gin:
            lines += ["Takes `--gin_file=FILE` (repeatable, later ones win), `--gin.NAME=VALUE` for one "
                      "[setting](settings.md), and `--gin_search_paths=DIRS`.", ""]
        shown = [flag for flag in one.flags if not flag.name.startswith(("--gin_", "--debug"))]
        if shown:
            lines += ["| flag | meaning |", "|---|---|",
                      *(f"| {code(flag.name)} | {_flag(flag)} |" for flag in shown), ""]
        if examples := one.after.partition("examples:")[2].strip("\n"):
            lines += ["```bash", *(line.strip() for line in examples.splitlines() if line.strip()), "```", ""]
    return "\n".join([*lines, "Every command takes `--debug`, which shows the traceback of an error.", ""])


def _flag(flag: Flag) -> str:
    notes = [f"one of {', '.join(map(code, flag.choices))}"] if flag.choices else []
    notes += ["must be given"] if flag.required else []
    return cell(flag.meaning) + (f" ({'; '.join(notes)})" if notes else "")


def settings_page(found: Sequence[Documented]) -> str:
    """Every setting, the short names first."""
    lines = ["# Every setting", "", "This page is made from the code: meanings from the docstrings of what takes a "
             "setting, values from the shipped gin files. A setting is a line of a gin file, `NAME = VALUE`, or a "
             "flag, `--gin.NAME=VALUE`. [Settings by topic](../settings.md) says which to use for what.", "",
             "## Short names", "", "The shipped gin files give these to the parameters below.", "",
             "| setting | meaning |", "|---|---|"]
    lines += [f"| {code(one.name)}<br>{code(one.type)} | {cell(one.meaning)} Sets {listed(one.bound)}.{_values(one)} |"
              for one in found if one.is_macro]
    configurables: dict[str, list[Documented]] = {}
    for one in found:
        if not one.is_macro:
            configurables.setdefault(one.name.partition(".")[0], []).append(one)
    for name, parameters in configurables.items():
        path = parameters[0].defined.partition(":")[0].replace(".", "/")
        lines += ["", f"## {name}", "", f"Taken by `{parameters[0].defined.partition(':')[2]}` of `{path}`.", "",
                  "| setting | default | meaning |", "|---|---|---|"]
        for one in parameters:
            by = f" Set by {listed(one.bound)}." if one.bound else ""
            default = "must be set" if one.default is None else code(one.default)
            lines.append(f"| {code(one.name)}<br>{code(one.type)} | {default} | {cell(one.meaning)}{by} |")
    return "\n".join([*lines, ""])


def listed(names: Iterable[str]) -> str:
    """Names as code, with commas."""
    return ", ".join(map(code, names))


def _values(one: Documented) -> str:
    """A line of the first values of a setting, each with its file, as far as they are short."""
    shown = {}
    for where, value in one.files:
        if len(value) <= 40:
            shown.setdefault(value, where.rpartition(":")[0].removeprefix("gin/"))
    found = [f"{code(value)} in {file}" for value, file in shown.items()]
    return f"<br>{', '.join(found[:3])}{', ...' if len(found) > 3 else ''}" if found else ""


def names_page(registries: Iterable[tuple[str, Registry]]) -> str:
    """Everything that is asked for by name."""
    lines = ["# Names", "", "This page is made from the code: what settings and commands take by name.", ""]
    for name, registry in registries:
        entries = registry.entries()
        options = any(entry.options for entry in entries)
        lines += [f"## {registry.title} {{ #{name} }}", "", f"Asked for by `{registry.use}`.", "",
                  f"| name | what it is |{f' {registry.options} |' if options else ''}",
                  f"|---|---|{'---|' if options else ''}", *(_entry(entry, options) for entry in entries), ""]
    return "\n".join(lines)


def _entry(entry: Entry, options: bool) -> str:
    return f"| {code(entry.name)} | {cell(entry.description)} |" + (
        f" {' '.join(map(code, entry.options))} |" if options else "")


def cell(text: str) -> str:
    """A text for a cell of a table: in one line, with its bars and tags escaped."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def code(text: str) -> str:
    """A text as code for a cell of a table; there Python-Markdown takes a bar as it is."""
    return f"`{' '.join(text.split())}`" if text else ""


# ---- Notebook -------------------------------------------------------------------------------------


def notebook_page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their paths in the site."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for each in notebook["cells"]:
        source = "".join(each["source"])
        if each["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in each["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"tutorial/{len(pictures)}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![Output of the cell above]({name})")
            elif text := "".join(output.get("text", "")) or "".join(data.get("text/plain", "")):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures
