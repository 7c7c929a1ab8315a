# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Find the pictures that a user names: files, URLs, and folders of files."""

from pathlib import Path

# suffixes of `UNTRUSTED_FORMATS`, and of what pillow-heif reads
PICTURE_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif", ".heic", ".heif"),
}


def find_pictures(sources: list[str]) -> list[str]:
    """The pictures of files, URLs and folders, each once. A folder gives its files, and those of the folders in it,
    whose names end like a picture's, sorted.

    Raises:
        ValueError: a folder has no pictures.
    """
    found: list[str] = []
    for source in sources:
        folder = Path(source).expanduser()
        if not folder.is_dir():
            found.append(source)
            continue
        files = sorted(path for path in folder.rglob("*") if _is_picture(path))
        if not files:
            raise ValueError(f"The folder {source!r} has no pictures.")
        found += map(str, files)
    return list(dict.fromkeys(found))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".") and path.is_file()
