"""Code as pseudocode: the words for operators and keywords.

Tokens are separated by a blank; operators and keywords become the words in the tables below; names, numbers, strings,
comments, brackets, commas, colons and dots are unchanged. A Python statement becomes a line, with four blanks for
each block level; code of other languages keeps its lines and indentation.
"""

_OPERATORS = {
    "==": "is equal to", "!=": "is not equal to", "===": "is identical to", "!==": "is not identical to",
    "<": "is less than", ">": "is greater than", "<=": "is at most", ">=": "is at least",
    "=": "becomes", ":=": "becomes", "<-": "receives", "+": "plus", "-": "minus", "*": "times", "/": "divided by",
    "//": "divided whole by", "%": "modulo", "**": "to the power of", "@": "at", "&": "bitwise and",
    "|": "bitwise or", "^": "bitwise xor", "~": "bitwise not", "<<": "shifted left by", ">>": "shifted right by",
    ">>>": "shifted right without sign by", "&^": "bitwise and not", "&&": "and", "||": "or", "??": "or if missing",
    "!": "not", "++": "plus one", "--": "minus one", "->": "giving", "=>": "giving", "?": "then",
    "+=": "increased by", "-=": "decreased by",
}
_KEYWORDS = {
    "def": "define", "function": "define", "func": "define", "lambda": "function of", "return": "give back",
    "elif": "otherwise if", "else": "otherwise", "while": "as long as", "break": "leave the loop",
    "continue": "go on with the loop", "pass": "do nothing", "try": "attempt", "except": "on error",
    "catch": "on error", "finally": "in any case", "raise": "fail with", "throw": "fail with",
    "throws": "may fail with", "yield": "hand out", "assert": "make sure", "with": "using", "as": "named",
    "import": "load", "del": "delete", "None": "nothing", "null": "nothing", "nil": "nothing", "void": "nothing",
    "True": "true", "False": "false", "this": "itself", "new": "a new", "switch": "choose by", "defer": "at the end",
    "async": "asynchronous", "await": "wait for", "global": "of the module", "nonlocal": "of the function around",
    "extends": "which is a", "implements": "which serves as",
}


def operator_in_words(text: str) -> str:
    """An operator as words; brackets and separators are unchanged."""
    if text not in _OPERATORS and len(text) > 1 and text[-1] == "=" and text[:-1] in _OPERATORS:
        return f"becomes itself {_OPERATORS[text[:-1]]}"
    return _OPERATORS.get(text, text)


def keyword_in_words(text: str) -> str:
    """A keyword as words."""
    return _KEYWORDS.get(text, text)
