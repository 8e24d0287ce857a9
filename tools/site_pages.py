"""Pages of the site that are made from other files, so that nothing is written twice: a hook of mkdocs.yml.

README.md is the front page, CONTRIBUTING.md and CHANGELOG.md are pages, and each room has a page of the reference.
Links are those that work in the repository: one to a file outside docs/ leads to a copy of it.
"""

import pathlib
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changes.md"}
# Room -> what its page shows, in this order; the names in x2v_jax itself are the first page.
ROOMS = {
    "request": "What one video is asked for, and what is decided of it.",
    "pipeline": "The order of the stages.",
    "generate": "The stages: text, image, noise, denoising, decoding.",
    "media": "Pictures, videos and tensors in files.",
    "memory": "What a video needs, and what there is.",
    "checkpoint": "Files of weights: read, named, quantized, converted.",
    "diffusion": "What happens between noise and latents.",
    "models": "The networks.",
    "ops": "Operations with kernels, one folder each.",
    "parallel": "Many devices.",
    "config": "Config files and the flags that change them.",
    "shipped": "What travels with the library.",
    "errors": "What a mistake raises.",
    "train": "The trainers.",
}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and copies of what pages link to."""
    for name, uri in _PAGES.items():
        files.append(File.generated(config, uri, content=(_ROOT / name).read_text()))
    for uri, content in reference_pages().items():
        files.append(File.generated(config, uri, content=content))
    for file in list(files.documentation_pages()):
        for path in links(file.content_string, _source(file.src_uri)):
            if (
                (uri := _address(path)) not in _PAGES.values()
                and (_ROOT / path).is_file()
                and uri not in files.src_uris
            ):
                files.append(File.generated(config, uri, abs_src_path=str(_ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns the links of the repository into those of the site."""
    source = _source(page.file.src_uri)

    def turned(match: re.Match[str]) -> str:
        sign, text, target, anchor = match.groups()
        if (path := _path(target, source)) is None:
            return match[0]
        if (_ROOT / path).is_dir():  # has no page
            return text if text.startswith("`") else f"{text} (`{path}`)"
        up = "../" * page.file.src_uri.count("/")
        return f"{sign}[{text}]({up}{_address(path)}{anchor or ''})"

    # ```bash run is for tools/run_documented_commands.py; highlighting knows bash.
    return _LINK.sub(turned, markdown.replace("```bash run\n", "```bash\n"))


def reference_pages() -> dict[str, str]:
    """Address -> text of the pages that mkdocstrings fills: the public names, then a page a room."""
    public = [name for name in _public_names() if not name.startswith("__")]
    pages = {
        "reference/index.md": "# Public names\n\nEach is imported from `x2v_jax`.\n\n"
        + "\n".join(f"::: x2v_jax.{name}\n" for name in public)
    }
    for room, about in ROOMS.items():
        module = room if room == "train" else f"x2v_jax.{room}"
        pages[f"reference/{room}.md"] = f"# {room}\n\n{about}\n\n::: {module}\n"
    return pages


def links(markdown: str, source: pathlib.PurePosixPath) -> set[str]:
    """The files of the repository that a text links to, as paths from its root; `source` is the text's own folder."""
    return {path for match in _LINK.finditer(markdown) if (path := _path(match[3], source)) is not None}


def _source(uri: str) -> pathlib.PurePosixPath:
    """The folder in the repository of the file that a page is made from."""
    return pathlib.PurePosixPath() if uri in _PAGES.values() else pathlib.PurePosixPath("docs", uri).parent


def _path(target: str, source: pathlib.PurePosixPath) -> str | None:
    if "://" in target or target.startswith("mailto:"):
        return None
    path = (_ROOT / source / target).resolve()
    return path.relative_to(_ROOT).as_posix() if path.is_relative_to(_ROOT) and path.exists() else None


def _address(path: str) -> str:
    """Where a file of the repository is in the site."""
    return _PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}")


def _public_names() -> list[str]:
    """x2v_jax.__all__, read without importing it."""
    text = (_ROOT / "x2v_jax/__init__.py").read_text()
    match = re.search(r"__all__ = \[(.*?)\]", text, re.DOTALL)
    return re.findall(r'"(\w+)"', match[1] if match else "")
