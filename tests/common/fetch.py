# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Fetch the common test suites of the installed transformers: `python tests/common/fetch.py`.

A wheel of transformers has no tests, its source distribution has the common ones. This downloads that of the installed
version with pip (10 MB) and keeps its `tests` folder, where nothing else is done from the second call on.
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
    """Put the suites of the installed transformers at `SUITES`, whole or not at all.

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
            raise SystemExit(f"The source distribution of {requirement} cannot be had: see pip's message above.")
        (archive,) = Path(directory).glob("*.tar.gz")
        unpacked = Path(directory, "tests")
        unpacked.mkdir()
        with tarfile.open(archive) as source:
            for member in source:
                folder, name = PurePosixPath(member.name).parts[1:-1], PurePosixPath(member.name).name
                if folder == ("tests",) and member.isfile():
                    unpacked.joinpath(name).write_bytes(source.extractfile(member).read())
        # the suites load the folder as a module to find transformers, and the archive leaves this file out
        unpacked.joinpath("__init__.py").touch()
        unpacked.rename(SUITES)


if __name__ == "__main__":
    fetch_suites()
    sys.stdout.write(
        f"{SUITES}: {len(list(SUITES.glob('test_*.py')))} suites of transformers {TRANSFORMERS_VERSION}\n"
    )
