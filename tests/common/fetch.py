# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Fetch the common test suites of the installed transformers: `python tests/common/fetch.py`.

A wheel of transformers has no tests, but the source distribution has the common ones. This script downloads the source
distribution of the installed version with pip (10 MB) and keeps its `tests` folder. If the folder exists, the script
does nothing.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

TRANSFORMERS_VERSION = version("transformers")
SUITES = Path(__file__).parents[2] / ".cache" / f"transformers-{TRANSFORMERS_VERSION}" / "tests"


def fetch_suites() -> None:
    """Write the suites of the installed transformers to `SUITES`, completely or not at all.

    Raises:
        SystemExit: pip cannot download the source distribution.
    """
    if SUITES.exists():
        return
    SUITES.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SUITES.parent) as directory:
        requirement = f"transformers=={TRANSFORMERS_VERSION}"
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=transformers", requirement]
        if subprocess.run([*download, "--quiet", "--dest", directory]).returncode != 0:
            raise SystemExit(
                f"The source distribution of {requirement} cannot be downloaded: see pip's message above."
            )
        (archive,) = Path(directory).glob("*.tar.gz")
        unpacked = Path(directory, "tests")
        unpacked.mkdir()
        with tarfile.open(archive) as source:
            for member in source:
                folder, name = PurePosixPath(member.name).parts[1:-1], PurePosixPath(member.name).name
                if folder == ("tests",) and member.isfile():
                    unpacked.joinpath(name).write_bytes(source.extractfile(member).read())
        # the suites import the folder as a package, but the archive does not have this file
        unpacked.joinpath("__init__.py").touch()
        unpacked.rename(SUITES)


if __name__ == "__main__":
    fetch_suites()
    sys.stdout.write(
        f"{SUITES}: {len(list(SUITES.glob('test_*.py')))} suites of transformers {TRANSFORMERS_VERSION}\n"
    )
