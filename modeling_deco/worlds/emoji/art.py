# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The art of the emoji world: icons of eight sets by six artists, rendered once into the user's cache.

    python -m modeling_deco.worlds.emoji.art [--iconify FILE] [--tuxpaint /usr/share/tuxpaint/stamps]

The SVG files are those of the npm package `@iconify/json`, which `npm pack` downloads unless `--iconify` names the
file. resvg renders them. Stamps of Tux Paint, many of them photographs, are a test alone: Debian's package
`tuxpaint-stamps-default` installs them. `ATTRIBUTION.md` beside this file names the artists and licences.
"""

import argparse
import base64
import csv
import hashlib
import io
import json
import logging
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from multiprocessing import Pool
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm

from ...utils.cache import cache
from ...utils.errors import InputError
from ...utils.program import run
from ...utils.staging import staged_folder
from .concepts import CONCEPTS

logger = logging.getLogger(__name__)

VERSION = "2.2.535"
SHA512 = "nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="
ICON_SIZE = 224  # pixels

# Sets by one artist are in one split: Fluent and Fluent flat share their drawings, and so do the two sets of Noto.
# Sets under CC BY-SA are not trained on: OpenMoji is a test. emojione-v1 is left out, as it is related to emojione.
SETS = {
    "train": ("noto", "noto-v1", "twemoji", "emojione"),
    "validation": ("fxemoji",),
    "test": ("fluent-emoji", "fluent-emoji-flat"),
    "openmoji": ("openmoji",),
    "tuxpaint": ("tuxpaint",),
}
_BYTES_OF_ICONS = 200 * 1024**2


def art_folder() -> Path:
    """Where the rendered icons are: `SET/ICON.png`, RGBA."""
    return cache() / f"emoji-art-{VERSION}-{ICON_SIZE}"


def _missing(path: Path) -> InputError:
    needs = "--tuxpaint and the folder of the stamps" if "tuxpaint" in path.parts else "npm, or --iconify and its file"
    return InputError(
        f"The art of the emoji world is missing: {path} does not exist; run "
        f"'python -m modeling_deco.worlds.emoji.art', which needs {needs}."
    )


@lru_cache(maxsize=len(SETS))
def concepts_of(split: str) -> tuple[str, ...]:
    """The concepts that a split's artists have drawn.

    Raises:
        InputError: the art has not been rendered.
    """
    for name in SETS[split]:
        if not (art_folder() / name).is_dir():
            raise _missing(art_folder() / name)
    return tuple(concept for concept in CONCEPTS if icon_names(split, concept))


@lru_cache(maxsize=4096)
def icon_names(split: str, concept: str) -> tuple[tuple[str, str], ...]:
    """The `(set, icon)` pairs that show a concept in a split, which may be none: not every set has every icon."""
    return tuple(pair for pair in _wanted(split, concept) if _path(*pair).exists())


def _wanted(split: str, concept: str) -> list[tuple[str, str]]:
    return [(name, icon) for name in SETS[split] for icon in _icons(name, concept)]


def _icons(set_name: str, concept: str) -> tuple[str, ...]:
    if set_name == "tuxpaint":
        return tuple(stamp.replace("/", "-") for stamp in _stamps() if _stamps()[stamp] == concept)
    thing = CONCEPTS[concept]
    return thing.fxemoji_icons if set_name == "fxemoji" else thing.icons


@lru_cache(maxsize=1)
def _stamps() -> dict[str, str]:
    """Tux Paint's stamps, and the concept that each shows."""
    with Path(__file__).with_name("tuxpaint.csv").open(encoding="utf-8", newline="") as file:
        return {row["stamp"]: row["name"] for row in csv.DictReader(file)}


def _path(set_name: str, icon_name: str) -> Path:
    return art_folder() / set_name / f"{icon_name}.png"


@lru_cache(maxsize=4096)
def icon(set_name: str, icon_name: str) -> Image.Image:
    """An icon, RGBA, cut to its ink.

    Raises:
        InputError: the art has not been rendered.
    """
    path = _path(set_name, icon_name)
    if not path.exists():
        raise _missing(path)
    with Image.open(path) as image:
        return image.convert("RGBA").crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 20)).getbbox())


def fetch(iconify: Path | None = None) -> Path:
    """Render the icons of all concepts into the cache, if they are not there. Returns `art_folder()`.

    Args:
        iconify: the file of the npm package. Default: `npm pack` downloads it.

    Raises:
        InputError: npm is not installed or fails, or the file is another one.
    """
    folder = art_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory() as temporary:
            package = _download(Path(temporary)) if iconify is None else iconify
            _check(package)
            with staged_folder(folder, _BYTES_OF_ICONS, check=lambda: None) as incomplete, Pool() as pool:
                jobs = list(_svgs(package, incomplete))
                for _ in tqdm(pool.imap_unordered(_render, jobs, chunksize=8), total=len(jobs), unit="icon"):
                    pass
    return folder


def fetch_stamps(stamps: Path) -> Path:
    """Copy the stamps of Tux Paint that show a concept into the cache, where `fetch` has rendered the icons.

    Args:
        stamps: folder of the stamps, as Debian's `tuxpaint-stamps-default` has it.

    Raises:
        InputError: a stamp is missing.
    """
    folder = art_folder() / "tuxpaint"
    with FileLock(f"{art_folder()}.lock"):
        if folder.exists():
            return folder
        with staged_folder(folder, _BYTES_OF_ICONS, check=lambda: None) as incomplete:
            for stamp in _stamps():
                path = stamps / f"{stamp}.png"
                if not path.is_file():
                    raise InputError(f"--tuxpaint {stamps} has no {stamp}.png; install tuxpaint-stamps-default.")
                with Image.open(path) as image:
                    image = image.convert("RGBA")
                    image.thumbnail((ICON_SIZE, ICON_SIZE))
                    image.save(incomplete / f"{stamp.replace('/', '-')}.png")
    return folder


def _download(folder: Path) -> Path:
    command = ["npm", "pack", f"@iconify/json@{VERSION}", "--silent"]
    logger.info("downloading 104 MB: %s", " ".join(command))
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError("npm is not installed; install Node.js, or pass --iconify FILE.") from None
    if done.returncode != 0:
        last_line = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise InputError(f"npm could not download @iconify/json {VERSION}: {last_line}; pass --iconify with its file.")
    return folder / f"iconify-json-{VERSION}.tgz"


def _check(package: Path) -> None:
    if not package.is_file():
        raise InputError(f"--iconify {package} is not a file; pass that of the npm package @iconify/json {VERSION}.")
    digest = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
    if digest != SHA512:
        raise InputError(f"{package} is not the file of the npm package @iconify/json {VERSION}: its SHA-512 differs.")


def _svgs(package: Path, out: Path) -> Iterator[tuple[Path, str]]:
    with tarfile.open(package) as archive:
        for split, names in SETS.items():
            for name in set(names) - {"tuxpaint"}:
                file = archive.extractfile(f"package/json/{name}.json")
                assert file is not None
                icons = json.load(file)
                (out / name).mkdir()
                wanted = {icon for concept in CONCEPTS for of, icon in _wanted(split, concept) if of == name}
                for icon_name in sorted(wanted & (icons["icons"].keys() | icons.get("aliases", {}).keys())):
                    yield out / name / f"{icon_name}.png", _svg(icons, icon_name)


def _svg(icons: dict[str, Any], name: str) -> str:
    is_flipped = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        name, is_flipped = alias["parent"], is_flipped ^ alias.get("hFlip", False)
    drawn = icons["icons"][name]
    fields = {"left": 0, "top": 0, "width": 16, "height": 16} | {
        key: icons[key] for key in ("left", "top", "width", "height") if key in icons
    }
    fields |= {key: drawn[key] for key in fields if key in drawn}
    flip = f' transform="matrix(-1 0 0 1 {2 * fields["left"] + fields["width"]} 0)"' if is_flipped else ""
    box = "{left} {top} {width} {height}".format(**fields)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
        f"<g{flip}>{drawn['body']}</g></svg>"
    )


def _render(job: tuple[Path, str]) -> None:
    import resvg_py

    path, svg = job
    png = resvg_py.svg_to_bytes(svg_string=svg, width=ICON_SIZE, height=ICON_SIZE)
    Image.open(io.BytesIO(bytes(png))).convert("RGBA").save(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Render the art of the emoji world into the cache.")
    parser.add_argument("--iconify", type=Path, help="file of the npm package @iconify/json (default: npm pack)")
    parser.add_argument("--tuxpaint", type=Path, help="folder of Tux Paint's stamps, to test on them too")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info("the art is in %s", fetch(args.iconify))
    if args.tuxpaint is not None:
        logger.info("the stamps are in %s", fetch_stamps(args.tuxpaint))


if __name__ == "__main__":
    run("emoji.art", main, bad_input=(InputError,))
