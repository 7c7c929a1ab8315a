# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Shows files from outside of docs/ on the site, and makes links between them work there.

Every link in a document leads from its place in the repository, so that it also works where the repository is shown.
On the site the README is the first page, and the results of the benchmarks lie in results/. A link to any other file
of the repository becomes plain text: the repository has no public address.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "MODEL_CARD.md": "model-card.md",
}
RESULTS = "benchmarks/results/"
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    for path, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    for path in (ROOT / RESULTS).rglob("*.*"):
        if path.suffix in (".png", ".json", ".jsonl"):
            target = path.relative_to(ROOT / RESULTS).as_posix()
            files.append(File.generated(config, f"results/{target}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = Path(page.file.abs_src_path).relative_to(ROOT)

    def link(match: re.Match) -> str:
        image, text, target, anchor = match.groups(default="")
        if re.match(r"https?:", target):
            return match[0]
        path = Path(os.path.normpath(source.parent / target)).as_posix()
        on_site = PAGES.get(path) or path.removeprefix("docs/")
        if path.startswith(RESULTS):
            on_site = path.replace(RESULTS, "results/", 1)
        if files.get_file_from_path(on_site) is None:
            return text
        return f"{image}[{text}]({os.path.relpath(on_site, Path(page.file.src_uri).parent)}{anchor})"

    return LINK.sub(link, markdown)
