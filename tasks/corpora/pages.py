"""Web pages as text: HTML without its markup.

Blocks (paragraphs, headings, items, cells, ...) become lines, blanks are merged except in `pre`, and scripts,
styles, form choices and other invisible elements are left out. Navigation and advertisements are not filtered.
"""

import codecs
import re

HTML = ("text/html", "application/xhtml+xml")

_HIDDEN = frozenset("head script style noscript template svg math iframe object select datalist textarea".split())
_INLINE = frozenset("a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark q s samp "
                    "small span strike strong sub sup time tt u var wbr".split())
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE)


def decoded(content: bytes, content_type: str) -> str | None:
    """The text of a page, decoded by the encoding in its content type or its own declaration, else UTF-8; None if that
    fails."""
    of_type = re.search(r"charset\s*=\s*[\"']?([\w.:-]{2,40})", content_type, re.IGNORECASE)
    within = _CHARSET.search(content[:4096])
    named = of_type[1] if of_type else within[1].decode() if within else "utf-8"
    try:
        encoding = codecs.lookup(named).name
    except LookupError:
        encoding = "utf-8"
    # As in browsers: text declared in one of these encodings is often in a superset of it.
    encoding = {"gb2312": "gb18030", "gbk": "gb18030", "iso8859-1": "cp1252", "ascii": "utf-8"}.get(encoding, encoding)
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except (UnicodeError, LookupError):  # a codec that is not for text, such as hex
        return None


def title_and_text(page: str) -> tuple[str, str] | None:
    """The title of a page, and its text without empty lines; None if elements nest too deeply."""
    from lxml import etree

    parser = etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, huge_tree=True)
    # Characters that XML forbids, at which the parser would stop.
    cleaned = _CONTROLS.sub(" ", page).encode("utf-8", "replace")
    root = etree.fromstring(cleaned, parser) if cleaned.strip() else None
    if parser.error_log.filter_types([etree.ErrorTypes.ERR_RESOURCE_LIMIT]):
        return None
    if root is None:
        return "", ""
    found: list[str] = []
    title: list[str] = []
    hidden = pre = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag, is_start = element.tag, event == "start"
        if tag == "title" and is_start and not title:
            title.append(element.text or "")
        if tag not in _INLINE and not hidden and found and not found[-1].endswith("\n"):
            found.append("\n")
        step = 1 if is_start else -1
        hidden += step * (tag in _HIDDEN)
        pre += step * (tag == "pre")
        data = (element.text if is_start else element.tail) or ""
        if hidden or not data:
            continue
        if not pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip(" ") if not found or found[-1][-1].isspace() else data
        found += [data] * bool(data)
    lines = (line.rstrip() for line in "".join(found).split("\n"))
    return " ".join("".join(title).split()), "\n".join(line for line in lines if line.strip())
