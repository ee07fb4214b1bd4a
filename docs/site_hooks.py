"""Hooks of mkdocs: pages that lie outside docs/, and links that lead there.

The Markdown files link to each other relatively, so that the repository's file view can follow the links. On the
site, a link to a file outside docs/ becomes a link to its page if it has one (`PAGES`), and otherwise a link to the
repository. While the repository's address is unknown (``repo_url`` in mkdocs.yml), such a link becomes plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "readme.md",  # outside the navigation, so that its links are checked too
    "benchmarks/README.md": "measuring.md",
    "examples/README.md": "examples.md",
    "savl/weights/savl-tiny.md": "savl-tiny.md",
}
"""Files outside docs/ that are pages of the site, by the repository's path; the values are paths in docs/."""
LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\((?P<target>[^)\s]+)\)")
SHALLOW = re.compile(r"\n[ ]*\n[ ]{1,3}\S")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)

log = get_plugin_logger("savl")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the page's relative links, which are those of the repository, to those of the site."""
    uri = page.file.src_uri
    if uri == PAGES["README.md"]:
        page.meta["search"] = {"exclude": True}
    source = next((outside for outside, inside in PAGES.items() if inside == uri), f"docs/{uri}")

    def rewrite(match: re.Match[str]) -> str:
        target, _, anchor = match["target"].partition("#")
        if not target or ":" in target or target.startswith("/"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if inside is not None:
            target = posixpath.relpath(inside, posixpath.dirname(uri) or ".")
        elif not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", source, path)
            return match[0]
        elif not config.repo_url:
            return match["text"]
        else:
            kind = "tree" if (ROOT / path).is_dir() else "raw" if match["image"] else "blob"
            target = f"{config.repo_url.rstrip('/')}/{kind}/main/{path}"
        return f"{match['image']}[{match['text']}]({target}{'#' + anchor if anchor else ''})"

    if SHALLOW.search(FENCE.sub("", markdown)):
        log.warning("%s indents a paragraph within a list by fewer than the four spaces that the site needs", source)
    pieces, start = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(rewrite, markdown[start : fence.start()]), fence[0]]
        start = fence.end()
    return "".join([*pieces, LINK.sub(rewrite, markdown[start:])])
