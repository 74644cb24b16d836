"""The paragraphs of a manual page, as plain text, in the order in which any translation of the page has them too."""

import re
import shlex

_FONTS = frozenset({"B", "I", "R", "SM", "SB"})
_MIXED = frozenset({"BR", "RB", "BI", "IB", "IR", "RI"})  # their arguments touch each other
_LINKS = frozenset({"UR", "MT", "UE", "ME"})  # around a link's text
_HEADINGS = frozenset({"SH", "SS"})
_TAGGED = frozenset({"TP", "TQ"})
_CODE = {"nf": "fi", "EX": "EE", "TS": "TE", "EQ": "EN"}  # lines of code, tables and formulas: no sentences
_SIGNS = {
    "aq": "'", "cq": "'", "oq": "'", "dq": '"', "lq": '"', "rq": '"', "Fo": "«", "Fc": "»", "em": "—", "en": "-",
    "bu": "", "co": "©", "ha": "^", "ti": "~", "rs": "\\", "mu": "x", "+-": "±", "<=": "<=", ">=": ">=", "->": "->",
}  # fmt: skip
_COMMENT = re.compile(r"(?<!\\)\\[\"#].*")
_ESCAPE = re.compile(
    r"\\(?:(?P<sign>\((?:..)|\[[^\]]*\])|(?:[fnmgkFM*])(?:\([^\n]{2}|\[[^\]]*\]|.)|s[-+]?\d{1,2}|[hvwldouNbALCDHRSxXYZ]'[^']*'|"
    r"(?P<other>.))"
)
_OTHERS = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": "."}


def paragraphs(page: str) -> list[str]:
    r"""Headings, tags and paragraphs of a page written with the man macros, each as one line.

    Code, tables and comments are left out, so that a page and its translation have as many.

    >>> paragraphs(".TH seven 2\n.SH NAME\nseven \\- gives 7\n.SH NOTES\nUse\n.BR eight (2)\ninstead.")
    ['NAME', 'seven - gives 7', 'NOTES', 'Use eight(2) instead.']
    """
    return [text for _, text in marked(page)]


def marked(page: str) -> list[tuple[str, str]]:
    """The same, each with what it is: ``heading``, ``tag`` or ``text``."""
    found: list[tuple[str, str]] = []
    open_: list[str] = []
    until, kind = "", "text"

    def close() -> None:
        text = " ".join(" ".join(open_).split())
        open_.clear()
        if text:
            found.append((kind, text))

    for line in _joined(page):
        macro, arguments = _macro(line)
        if until:
            until = "" if macro == until else until
        elif macro in _LINKS:
            if macro.endswith("E") and open_:  # what stands right after a link
                open_[-1] += _plain(arguments)
        elif macro is None or macro in _FONTS or macro in _MIXED:
            open_.append(_shown(macro, arguments))
            if kind != "text" and open_[-1].strip():
                close()
                kind = "text"
            elif macro is None and not open_[-1].strip():
                close()
        else:
            close()
            kind = "tag" if macro in _TAGGED else "text"  # the next line is the tag
            until = _CODE.get(macro, "")
            if macro in _HEADINGS:
                found.append(("heading", " ".join(_shown("B", arguments).split())))
    close()
    return found


def _shown(macro: str | None, arguments: str) -> str:
    """A line's text: that of a macro of fonts, or without one all of it."""
    if macro is None:
        return _plain(arguments)
    return _plain(("" if macro in _MIXED else " ").join(_given(arguments)))


def _joined(page: str) -> list[str]:
    """Lines without comments; one that ends in a backslash goes on in the next."""
    lines: list[str] = []
    carried = ""
    for raw in page.splitlines():
        if raw.startswith(('.\\"', "'\\\"", '."')):
            continue
        line = carried + _COMMENT.sub("", raw)
        carried = ""
        if line.endswith("\\") and not line.endswith("\\\\"):
            carried = line[:-1]
        else:
            lines.append(line.removesuffix("\\c"))
    return [*lines, carried] if carried else lines


def _macro(line: str) -> tuple[str | None, str]:
    if not line.startswith((".", "'")):
        return None, line
    name, _, arguments = line[1:].strip().partition(" ")
    return name, arguments


def _given(arguments: str) -> list[str]:
    """A macro's arguments, some of them quoted."""
    held = arguments.replace("\\ ", "\\~")
    try:
        lexer = shlex.shlex(held, posix=True)
        lexer.whitespace_split, lexer.commenters, lexer.quotes, lexer.escape = True, "", '"', ""
        return list(lexer)
    except ValueError:  # a quote that nobody closed
        return held.replace('"', "").split()


def _plain(text: str) -> str:
    def shown(found: re.Match[str]) -> str:
        sign = found["sign"]
        if sign is not None:
            return _SIGNS.get(sign[1:].removesuffix("]"), "")
        return _OTHERS.get(found["other"] or "", "")

    return _ESCAPE.sub(shown, text)
