"""Docstrings as the site shows them: fields that are written one a line become a list, examples a block of code.

In the source they stay plain text, which is what `help()` and editors show. An extension of griffe, see mkdocs.yml.
"""

import re

import griffe

_FIELD = re.compile(r"^( *)([a-z_]\w*(?:, \w+)*): (.*)$")
_SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Examples):\n")
_SHARED = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {8}.*)*)", re.MULTILINE)  # arguments in one item


def listed(text: str) -> str:
    """A docstring in which fields are items of a list, arguments that share an item have one each, examples are fenced.

    >>> print(listed("A size.\\n\\nheight, width: in pixels,\\n    both even."))
    A size.
    <BLANKLINE>
    - **height, width**: in pixels,
        both even.
    >>> print(listed("Args:\\n    a, b: numbers."))
    Args:
        a: numbers.
        b: numbers.
    """
    return "\n\n".join(_paragraph(paragraph) for paragraph in text.split("\n\n"))


def _paragraph(text: str) -> str:
    if _SECTION.match(text):
        return _SHARED.sub(lambda item: "\n".join(f"    {name}: {item[2]}" for name in item[1].split(", ")), text)
    if text.startswith(">>>"):
        return f"```python\n{text}\n```"
    lines: list[str] = []
    in_field = False
    for line in text.splitlines():
        field = _FIELD.match(line)
        # One that is indented belongs to the field above it, unless a sentence of that one only happens to break there.
        if field and (not field[1] or (in_field and lines[-1].endswith("."))):
            if lines and not in_field:
                lines.append("")
            in_field = True
            line = f"{field[1]}- **{field[2]}**: {field[3]}"
        lines.append(line)
    return "\n".join(lines)


class Listed(griffe.Extension):
    """Rewrites every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, **others: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
