"""Foreign text in the cells and lines of tables: nothing of it is Markdown or LaTeX."""

from __future__ import annotations

import re

_MARKDOWN = re.compile(
    r"[\\`*<|~$]|\](?=\()|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)"  # not the _ in a_b
)
_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    **{"\\": "\\textbackslash{}", "^": "\\textasciicircum{}", "~": "\\textasciitilde{}"},
    **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"},
}


def markdown(text: object) -> str:
    """One line that Markdown shows as it is, in a table, too."""
    return _MARKDOWN.sub(r"\\\g<0>", _one_line(text))


def markdown_code(text: object) -> str:
    """The same as code: within a fence longer than any in the text."""
    line = _one_line(text).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if "`" in line[:1] + line[-1:] else ""
    return f"{fence}{space}{line}{space}{fence}"


def latex(text: object) -> str:
    r"""One line that LaTeX shows as it is; ``\\`` before it would read a first ``[`` or ``*``."""
    shown = "".join(_LATEX.get(char, char) for char in _one_line(text))
    return re.sub(r"^[\[*]", r"{\g<0>}", shown)


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
