"""The rules for web text of Ma et al. (2024, arXiv:2309.16298), where they describe the pre-training data.

The paper lists what it removes: pages with under 60% Chinese characters, with under 150 characters, with only a title,
or with advertising words; and within pages special symbols, repeated paragraphs and navigation bars. It gives neither
word lists nor patterns: those here are ours, and options change them.

A filter returns the reason for removing a text, or None. An edit returns the remaining text.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

_HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_WHITE = re.compile(r"\s+")
_ENDS_A_SENTENCE = re.compile(r"[。！？!?…]|[.;；](?:[\s\"'”’)]|$)", re.MULTILINE)

ADVERTISING = (
    "点击购买", "立即购买", "限时优惠", "限时抢购", "免费领取", "加微信", "微信号", "扫码关注", "咨询热线", "代开发票",
    "办证刻章", "全国包邮", "货到付款", "招商加盟", "免费试用", "特价促销", "贷款热线", "博彩", "六合彩", "真人娱乐",
    "click here to buy", "limited time offer", "buy now and save", "order now", "free shipping on all orders",
    "casino bonus", "cheap viagra",
)
NAVIGATION = (
    "首页", "主页", "网站首页", "返回首页", "返回顶部", "设为首页", "加入收藏", "网站地图", "联系我们", "关于我们",
    "登录", "注册", "上一页", "下一页", "上一篇", "下一篇", "更多", "导航", "当前位置", "您的位置",
    "新闻中心", "友情链接", "版权声明",
    "home", "about", "about us", "contact", "contact us", "login", "log in", "sign in", "sign up", "register",
    "sitemap", "site map", "next", "previous", "prev", "menu", "search", "privacy policy", "terms of use", "faq",
    "help",
)
# Symbols that belong to prose.
_KEPT_SYMBOLS = frozenset("°©®™№℃℉")
_JOINERS = frozenset("\u200c\u200d")  # needed in Persian and Indic scripts


# ---- Filters -----------------------------------------------------------------------------------


def chinese_share(text: str, at_least: float = 0.6) -> str | None:
    """Removes text with a smaller share of Chinese characters, white space not counted."""
    share = share_of_chinese(text)
    return None if share >= at_least else f"under {at_least:.0%} Chinese characters"


def share_of_chinese(text: str) -> float:
    """The share of Han characters among those that are not white space; 0 if there are none."""
    letters = len(_WHITE.sub("", text))
    return len(_HAN.findall(text)) / letters if letters else 0.0


def minimum_length(text: str, characters: int = 150) -> str | None:
    """Removes text with fewer characters, not counting white space at its ends."""
    return None if len(text.strip()) >= characters else f"under {characters} characters"


def title_only(text: str, lines: int = 2) -> str | None:
    """Removes text of at most `lines` lines, none of which ends a sentence."""
    found = [line for line in text.splitlines() if line.strip()]
    return "title only" if len(found) <= lines and not _ENDS_A_SENTENCE.search(text) else None


def advertising(text: str, words: Sequence[str] = ADVERTISING, at_least: int = 1) -> str | None:
    """Removes text with at least this many occurrences of advertising words in all; case does not count."""
    found = _any_of(tuple(words)).findall(text.lower())
    return f"advertising: {found[0]}" if len(found) >= at_least else None


@functools.lru_cache
def _any_of(words: tuple[str, ...]) -> re.Pattern[str]:
    # Words of scripts with blanks match only whole words: "border now" does not contain "order now".
    bounded = (rf"\b{re.escape(word)}\b" if word.isascii() else re.escape(word) for word in map(str.lower, words))
    return re.compile("|".join(bounded))


# ---- Edits -------------------------------------------------------------------------------------


class _Symbols(dict[int, int | None]):
    """For str.translate: maps characters to themselves, or to None to drop them."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        drop = unicodedata.category(character) in ("So", "Co", "Cn", "Cc", "Cf", "Cs")
        keep = character in "\n\t" or character in _KEPT_SYMBOLS or character in _JOINERS
        self[code] = code if keep or not drop else None
        return self[code]


_SYMBOLS = _Symbols()


def special_symbols(text: str) -> str:
    """Drops control, private and unassigned characters, and pictures such as stars, boxes and emoji.

    By Unicode's general category: So (except °©®™№℃℉), Co, Cn, Cs, Cc (except tab and line feed), Cf (except joiners).
    A carriage return ends a line.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text if text.isascii() and text.isprintable() else text.translate(_SYMBOLS)


def repeated_paragraphs(text: str, at_least: int = 10) -> str:
    """Drops each line that repeats an earlier one, ignoring white space; lines of fewer letters and digits stay."""
    seen: set[str] = set()
    kept = []
    for line in text.split("\n"):
        plain = _WHITE.sub("", line)
        if sum(map(str.isalnum, plain)) >= at_least:
            if plain in seen:
                continue
            seen.add(plain)
        kept.append(line)
    return "\n".join(kept)


_BETWEEN_ITEMS = re.compile(r"\s*(?:[|｜>＞»›·•\t]|::|\s{2,}|(?<=[^\x00-\x7f]) (?=[^\x00-\x7f]))\s*")


def navigation_bars(text: str, words: Sequence[str] = NAVIGATION, longest_item: int = 20) -> str:
    """Drops menu lines: three or more short items, one of them a navigation word; or only navigation words.

    Items are separated by | > » › · • :: tabs, two blanks, or one blank between Chinese characters.
    """
    known = _known(tuple(words))
    return "\n".join(line for line in text.split("\n") if not _is_menu(line, known, longest_item))


@functools.lru_cache
def _known(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(word.lower() for word in words)


def _is_menu(line: str, known: frozenset[str], longest_item: int) -> bool:
    if len(line) > 2000 or not line.strip():
        return False
    items = [item for item in _BETWEEN_ITEMS.split(line.strip(" \t|[]【】")) if item]
    if not items or max(map(len, items)) > longest_item:
        return False
    of_navigation = sum(item.lower().strip("：:[]【】") in known for item in items)
    return of_navigation == len(items) > 1 or (len(items) >= 3 and of_navigation >= 1)
