"""What mkdocs does not do by itself: links from a page to a file of the repository outside of docs/.

Such a link is right where the page is read in the repository. On the site it leads to a copy of the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside of docs/ that a page links to; one that is not there stays a broken link."""
    for page in list(files.documentation_pages()):
        for path, _ in _LINK.findall(page.content_string):
            copy = _copy(path)
            if (ROOT / path).is_file() and files.get_file_from_path(copy) is None:
                content = (ROOT / path).read_bytes()
                files.append(File.generated(config, copy, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links lead to the copies."""
    return _LINK.sub(lambda found: f"]({_copy(found.group(1))})", markdown)


def _copy(path: str) -> str:
    # A name that neither mkdocs nor a browser takes for more than text.
    return f"repository/{path}.txt"
