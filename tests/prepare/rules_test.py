"""The rules of a preparation, on texts whose numbers are counted by hand."""

import pytest

from codellm_jax.prepare import code, quality, web
from codellm_jax.prepare.language import language
from codellm_jax.prepare.steps import EDITS, FILTERS, GLOBAL, apply, hash_of, steps_of

SENTENCE = "The grey cat sat with another dog and that was the end. "  # 12 words and a sign, 4 stop words


# ---- The paper's -------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "share"), [
    ("中文abcd", 2 / 6), ("中 文\n字abc", 0.5), ("", 0.0), (" \n", 0.0), ("代码", 1.0), ("中，文。", 0.5),
    ("𠀀a", 0.5)])
def test_share_of_chinese(text: str, share: float):
    assert web.share_of_chinese(text) == share


def test_under_six_tenths_of_chinese_goes():
    assert web.chinese_share("一二三四五六abcd") is None
    assert web.chinese_share("一二三四五abcde") == "under 60% Chinese characters"
    assert web.chinese_share("一二三四五abcde", at_least=0.5) is None


def test_150_characters_are_enough():
    assert web.minimum_length("字" * 150) is None
    assert web.minimum_length("字" * 149 + "  \n") == "under 150 characters"


@pytest.mark.parametrize(("text", "goes"), [
    ("Python 教程 - 首页", True), ("A title\n\nAnother line", True), ("One\nTwo\nThree", False),
    ("这是一句话。", False),
    ("It is 3.5 metres", True), ("It ends here.", False)])
def test_title_only(text: str, goes: bool):
    assert (web.title_only(text) == "title only") == goes


def test_advertising_words_are_whole_words():
    assert web.advertising("本店全国包邮，欢迎选购") == "advertising: 全国包邮"
    assert web.advertising("Order NOW!") == "advertising: order now"
    assert web.advertising("The border now runs here") is None
    assert web.advertising("全国包邮", at_least=2) is None
    assert web.advertising("red fish", words=["red"]) == "advertising: red"


def test_special_symbols():
    assert web.special_symbols("★标题★ 20°C\u200b\x07\ufeff ©\r\n下一行\r再\U0001f600") == "标题 20°C ©\n下一行\n再"
    assert web.special_symbols("a\tb\nc") == "a\tb\nc"


def test_repeated_paragraphs_keep_the_first():
    text = "第一段话写在这里很长啊\n}\n第一段话 写在这里很长啊\n}\n第二段话写在这里很长啊"
    assert web.repeated_paragraphs(text) == "第一段话写在这里很长啊\n}\n}\n第二段话写在这里很长啊"


@pytest.mark.parametrize(("line", "goes"), [
    ("首页 | 新闻 | 体育 | 财经", True), ("Home > Products > Shoes", True), ("上一页 下一页", True), ("首页", False),
    ("Home | About | Contact us", True), ("| x | y | z |", False),
    ("他说首页 | 很好看，我们都应该去看一看这个网站的内容", False),
    ("Go home and search there.", False), ("[首页] | [下一页]", True), ("", False), ("1 | 2 | 3", False)])
def test_navigation_bars(line: str, goes: bool):
    assert web.navigation_bars(f"前\n{line}\n后") == ("前\n后" if goes else f"前\n{line}\n后")


# ---- Gopher, C4, FineWeb -----------------------------------------------------------------------


def test_gopher_quality_counts_words():
    assert quality.gopher_quality(SENTENCE * 5) is None  # 60 words
    assert quality.gopher_quality(SENTENCE * 4) == "Gopher: under 50 words"
    assert quality.gopher_quality(SENTENCE * 5, most_words=59) == "Gopher: over 59 words"
    assert quality.gopher_quality("a b " * 40) == "Gopher: mean word length under 3"
    assert quality.gopher_quality("abcdefghijkl " * 60) == "Gopher: mean word length over 10"
    assert quality.gopher_quality(("# ... " + SENTENCE) * 5) is None  # 5 of each to 75 words and signs
    assert quality.gopher_quality((SENTENCE + "# # ") * 5) == "Gopher: over 0.1 hashes a word"
    assert quality.gopher_quality(("… ... " + SENTENCE) * 5) == "Gopher: over 0.1 ellipses a word"
    assert quality.gopher_quality(("- " + SENTENCE + "\n") * 5) == "Gopher: over 90% of lines are bullets"
    assert quality.gopher_quality((SENTENCE.strip() + "..\n") * 2 + (SENTENCE + "\n") * 4) == (
        "Gopher: over 30% of lines end with an ellipsis")  # 2 of 6
    assert quality.gopher_quality("1234 " * 11 + "the that " * 20) == "Gopher: under 80% of words have a letter"
    assert quality.gopher_quality("some words here " * 20) == "Gopher: under 2 stop words"


def test_gopher_repetition_of_table_a1():
    assert quality.gopher_repetition("One line here.\nAnother comes now.\nThe third is last.") is None
    lines = [f"Line number {number} is like no other of them all." for number in range(7)]
    assert quality.gopher_repetition("\n".join([*lines, *lines[:3]])) != (
        "Gopher: over 30% of lines are repeated")  # 3 of 10 are not over
    assert quality.gopher_repetition("\n".join([*lines, *lines[:4]])) == "Gopher: over 30% of lines are repeated"
    assert quality.gopher_repetition("a b\n\nc d\n\na b") == "Gopher: over 30% of paragraphs are repeated"
    # "x y" thrice is 9 of 21 characters with the blank, over 20%.
    assert quality.gopher_repetition("x y a x y bcdef x y g") == "Gopher: over 20% of characters are in one 2-gram"


def test_repeated_n_grams_are_counted_once_each():
    found = "a b c d e a b c d e a b c d e".split()
    assert quality._in_repeated(found, 5) == 10  # the second and the third
    assert quality._in_repeated(found, 4) == 8
    assert quality._in_repeated(found[:9], 5) == 0


def test_c4_lines():
    text = "\n".join(["A good line ends with a stop.", "no stop here at all", "Too short.",
                      "Enable Javascript to read this.", "We tell it in our privacy policy.",
                      "Is this [1] the one? [edit]", "It goes on and on and...",
                      '  He said "that is all of it."', "x" * 1001 + " and a few words."])
    assert quality.c4_lines(text) == 'A good line ends with a stop.\nHe said "that is all of it."'


def test_c4_page():
    assert quality.c4_page("One. Two! Three?") is None
    assert quality.c4_page("One. Two 3.5 and") == "C4: under 3 sentences"
    assert quality.c4_page("One. Two. Three. {") == "C4: a curly bracket"
    assert quality.c4_page("Lorem Ipsum dolor. A. B. C.") == "C4: lorem ipsum"


def test_fineweb_quality():
    long = "This line has many more than thirty characters in it{}"
    assert quality.fineweb_quality("\n".join(long.format(f" {n}.") for n in range(9))) is None
    assert quality.fineweb_quality("\n".join(long.format(f" {n}") for n in range(9))) == (
        "FineWeb: under 12% of lines end a sentence")
    assert quality.fineweb_quality("\n".join(["Short one.", "Short two.", "Short three.", long.format(".")])) == (
        "FineWeb: over 67% of lines are short")  # 3 of 4
    assert quality.fineweb_quality("\n".join([long.format(".")] * 3)) == (
        "FineWeb: over 1% of characters are in repeated lines")
    # Line ends are 3, words and signs 9: a third.
    letters = "abcdefghijklmnopqrstuvwxyzabcd"
    assert quality.fineweb_quality(f"{letters}e a b.\n\n\n{letters}f c d e.") == (
        "FineWeb: over 0.3 line ends a word")
    assert quality.fineweb_quality(" \n") == "FineWeb: empty"


# ---- Code --------------------------------------------------------------------------------------


def test_licences():
    assert code.licence("", "MIT") is None
    assert code.licence("", "GPL-3.0") == "licence: GPL-3.0"
    assert code.licence("# SPDX-License-Identifier: Apache-2.0\n", None) is None
    assert code.licence("// SPDX-License-Identifier: LGPL-2.1-only\n", None) == "licence: LGPL-2.1-only"
    assert code.licence("x = 1", None) == "licence: none told"
    assert code.licence("x = 1", None, unknown=True) is None


def test_generated_says_so_in_the_first_lines():
    assert code.generated("# Generated by protoc. DO NOT EDIT!\nx = 1") == "generated: generated by"
    assert code.generated("\n" * 5 + "# Generated by protoc") is None


def test_minified_and_long_lines():
    assert code.minified("a=1;if(b){c()}" * 100) == "minified"
    assert code.minified("some prose with blanks " * 100) is None
    assert code.line_lengths("a" * 1001) == "a line over 1000 characters"
    assert code.line_lengths("a" * 101 + "\n" + "a" * 101) == "lines over 100 characters on average"
    assert code.line_lengths("a" * 150 + "\n" + "a" * 50) is None


def test_letters_and_digits_are_a_quarter():
    assert code.alphanumeric_share("ab......") is None
    assert code.alphanumeric_share("a.......") == "under 25% letters and digits"


def test_python_must_parse():
    assert code.parses("print 'x'", "Python") == "does not parse"
    assert code.parses("print('x')", "python") is None
    assert code.parses("x = '\\d'\n", "python") is None
    assert code.parses("(" * 10_000 + ")" * 10_000, "python") is not None
    assert code.parses("int main() {", "c") is None
    assert code.parses("x = 1\0", "python") == "does not parse"


@pytest.mark.parametrize(("file", "goes"), [
    ("/data/tests/a.py", True), ("/data/test_a.py", True), ("a_test.go", True), ("src/a.test.js", True),
    ("FooTest.java", True), ("conftest.py", True), ("latest.py", False), ("contest/a.py", False),
    ("testify.py", False)])
def test_test_files(file: str, goes: bool):
    assert (code.test_files("", file) == "a test") == goes


@pytest.mark.parametrize(("text", "masked"), [
    ("write to jane.doe+x@mail.example.org, or", "write to <EMAIL>, or"), ("@decorator", "@decorator"),
    ("a@b", "a@b"),
    ("见 zhang@example.cn。", "见 <EMAIL>。"),
    ("git@github.com:me/it.git", "git@github.com:me/it.git"), ("x @ y.z", "x @ y.z")])
def test_e_mail_addresses(text: str, masked: str):
    assert code.mask_e_mails(text) == masked


@pytest.mark.parametrize(("text", "masked"), [
    ("id AKIAIOSFODNN7EXAMPLE.", "id <KEY>."), ("t = ghp_" + "a1" * 18, "t = <KEY>"),
    ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----\nrest", "<KEY>\nrest"),
    ("-----BEGIN PRIVATE KEY-----\nabc", "<KEY>"), ("api_key = 'a1b2c3d4e5f6'", "api_key = '<KEY>'"),
    ('"password": "hunter2!!"', '"password": "<KEY>"'), ("password = 'changeme'", "password = 'changeme'"),
    ("password = getpass()", "password = getpass()"), ("api_key = '<KEY>'", "api_key = '<KEY>'"),
    ("AIza" + "x" * 35, "<KEY>"),
    ("hash = 'd41d8cd98f00b204e9800998ecf8427e'", "hash = 'd41d8cd98f00b204e9800998ecf8427e'")])
def test_secrets(text: str, masked: str):
    assert code.mask_secrets(text) == masked
    assert code.mask_secrets(masked) == masked


def test_words_are_parted_as_spacy_parts_them():
    assert quality.words("'Mr. O'Neil's,' she said, _isn't_ a_b; do it... U.S. 3.5-fold, so do I.") == [
        "'", "Mr.", "O'Neil", "'s", ",", "'", "she", "said", ",", "_", "is", "n't", "_", "a_b", ";", "do", "it", "...",
        "U.S.", "3.5", "-", "fold", ",", "so", "do", "I."]


@pytest.mark.parametrize("secret", [
    *(f"{start}{'A1B2' * 4}" for start in ("AKIA", "ASIA", "AGPA", "AIDA", "AROA")),
    *(f"{start}{'A1b2' * 13}" for start in (
        "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xoxb-", "ya29.", "sk_live_", "rk_test_",
        "sk-", "sk-proj-", "hf_", "pypi-", "eyJhbGciOiJIUz.eyJzdWIiOiIxMj.")),
    f"AIza{'A1b2C' * 7}", f"npm_{'A1b2' * 9}", "-----BEGIN RSA PRIVATE KEY-----\nA1b2",
    *(f"{name} = 'a1b2c3d4e5'" for name in (
        "password", "PASSWD", "Secret", "api_key", "apikey", "ACCESS_KEY", "accessKey", "auth_token", "authToken",
        "access_token", "accesstoken", "private_key", "privateKey", "client_secret", "clientsecret", "pa\u017fsword"))])
def test_each_form_of_secret_is_masked(secret: str):
    masked = code.mask_secrets(f"here {secret}\n")
    assert "<KEY>" in masked and "1b2" not in masked and "A1B2" not in masked


# ---- Steps -------------------------------------------------------------------------------------


def test_every_rule_takes_every_text():
    for text in ("", " ", "\n\n", "中", "\x00", "a" * 5000, "[" * 2000, "# \n" * 300, "\ufffd\U0010ffff"):
        fields = {"text": text, "license": None, "language": "python", "file": "a.py"}
        for step in steps_of([*FILTERS, *EDITS], ["text.a"]):
            left, reason = apply(step, fields)
            assert isinstance(left, str) and (reason is None or reason), step.name


def test_steps_have_their_pools_and_all_options():
    found = steps_of(
        ["minimum_length", "licence", "mask_secrets", {"name": "parses", "sources": ["text.a"]}], ["text.a"])
    assert [step.sources for step in found] == [("text",), ("code",), (), ("text.a",)]
    assert found[0].options == {"characters": 150}
    assert found[0].looks_at("text.b") and not found[0].looks_at("code.b")
    assert hash_of(found) != hash_of(steps_of([{"name": "minimum_length", "characters": 149}], ["text.a"]))
    assert hash_of(steps_of(["minimum_length"], [])) == hash_of(
        steps_of([{"name": "minimum_length", "characters": 150}], []))


def test_languages():
    english = "The bill was read a second time and sent to a committee."
    chinese = "委员会在第二次审议后通过了这项法案，并送交表决。"
    german = "Der Entwurf wurde in zweiter Lesung beraten und an den Ausschuss verwiesen."
    assert language(english) is None and language(chinese) is None and language(german) == "language de"
    assert language(german, ["de"]) is None and language(english, ["de"]) == "language en"
    assert language(english, at_least=1.1) == "language en with a probability under 1.1"
    with pytest.raises(ValueError, match="py3langid does not know 'english'"):  # before anything is read
        steps_of([{"name": "language", "languages": ["english"]}], ["text.a"])
    [step] = steps_of([{"name": "language", "languages": ["en"]}], ["text.a"])
    assert step.options == {"languages": ["en"], "at_least": 0.65} and step.sources == ("text",)
    assert apply(step, {"text": german, "license": None, "language": None, "file": ""}) == (german, "language de")


@pytest.mark.parametrize(("steps", "told"), [
    ("exact_duplicates", "must be a list"), (["minimum_lenght"], "nearest: minimum_length"),
    ([3], "number 1: a step is"),
    ([{"name": "minimum_length", "chars": 3}], "no option 'chars'; it has characters"),
    ([{"name": "minimum_length", "characters": "3"}], "'characters' must be a whole number"),
    ([{"name": "chinese_share", "at_least": True}], "must be a number"), (["sample"], "needs the option 'budgets'"),
    ([{"name": "licence", "allowed": "mit"}], "must be a list of texts"),
    ([{"name": "sample", "budgets": {"text.b": 3}}], "'text.b', which is not a corpus"),
    ([{"name": "sample", "budgets": {"text.a": -3}}], "must be a positive number"),
    ([{"name": "sample", "budgets": {"text.a": 3}, "unit": "words"}], "must be one of bytes, tokens"),
    ([{"name": "near_duplicates", "bands": 0}], "'bands' must be a whole number, 1 or more"),
    ([{"name": "near_duplicates", "sources": ["web"]}], "'web', which is neither"),
    ([{"name": "near_duplicates", "sources": "text"}], "must be a list of corpora")])
def test_what_is_wrong_with_steps_is_said(steps, told: str):
    with pytest.raises(ValueError, match=told):
        steps_of(steps, ["text.a"])


def test_steps_of_all_kinds_are_known():
    assert set(GLOBAL) == {"exact_duplicates", "duplicated_paragraphs", "near_duplicates", "sample"}


def test_words_are_parted_as_spacy_does():
    assert quality.words('Don\'t say "well-known": 3.5 of U.S. men... it\'s foo_bar--so.') == [
        "Do", "n't", "say", '"', "well", "-", "known", '"', ":", "3.5", "of", "U.S.", "men", "...", "it", "'s",
        "foo_bar", "--", "so", "."]
