"""Builds the site as `mkdocs build --strict` does, and looks for anything that a browser would load from another host.

    python tools/check_site.py

Exit code 1 if a link leads nowhere, a docstring describes an argument that is not there, or a page loads something
foreign. Needs `pip install '.[docs]'`.
"""

import html.parser
import pathlib
import re
import subprocess
import sys
import tempfile

_ROOT = pathlib.Path(__file__).resolve().parent.parent
POLICY = "default-src 'self' 'unsafe-inline' data: blob:"  # of every page: what a script could ask for is refused
# Attributes that a browser loads by itself; the address of a link is not, until somebody clicks.
_LOADED = ("src", "srcset", "data", "poster")
_LINKS_NOT_LOADED = {"canonical", "prev", "next", "alternate", "license"}
_FOREIGN = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
_FOREIGN_STYLE = re.compile(r"(?:url\(|@import)\s*['\"]?\s*(?:https?:)?//[^\s'\")]+", re.IGNORECASE)


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.foreign: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "meta" and given.get("http-equiv", "").lower() == "content-security-policy":
            self.policy = given.get("content", "")
        loaded = [given[name] for name in _LOADED if name in given]
        if tag == "link" and not set(given.get("rel", "").split()) <= _LINKS_NOT_LOADED:
            loaded.append(given.get("href", ""))
        self.foreign += [value for value in loaded if any(_FOREIGN.match(part) for part in value.split(","))]
        self.foreign += _FOREIGN_STYLE.findall(given.get("style", ""))

    handle_startendtag = handle_starttag


def foreign(name: str, text: str) -> list[str]:
    """What a page (.html) or a style sheet (.css) loads from another host, a sentence each."""
    if name.endswith(".css"):
        return [f"{name} loads {found}" for found in _FOREIGN_STYLE.findall(text)]
    page = _Page()
    page.feed(text)
    problems = [f"{name} loads {found}" for found in [*page.foreign, *_styles(text)]]
    if page.policy != POLICY:
        problems.append(f"{name} has not the policy of tools/site_theme/main.html, so its scripts may load anything")
    return problems


def _styles(text: str) -> list[str]:
    inside = re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL)
    return [found for style in inside for found in _FOREIGN_STYLE.findall(style)]


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", name]
        if subprocess.run(command, cwd=_ROOT).returncode != 0:
            return 1
        texts = [path for path in sorted(folder.rglob("*")) if path.suffix in (".html", ".css")]
        problems = [
            problem for path in texts for problem in foreign(path.relative_to(folder).as_posix(), path.read_text())
        ]
        if not (folder / "search/search_index.json").is_file():
            problems.append("the site has no index to search in")
    print("\n".join(problems) or f"the site: {len(texts)} pages and style sheets, nothing from another host")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
