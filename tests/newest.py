# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""Run the tests marked `newest` on the newest releases that pip installs: `make test-newest`.

The package is installed as users install it, without constraints, in an environment of its own. The tests use every
private API that the package uses. `constraints.txt` and `constraints-newest.txt` list the versions that passed before.
If all packages have one of these versions, a failure is our fault and the exit code is 1. If a package is newer, a
failure is a warning of one line and the exit code is 0, so a release of another project does not block our changes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-newest"
PYTHON = ENVIRONMENT / "bin" / "python"
RESULTS = ROOT / ".cache" / "newest.xml"
PACKAGES = [
    f"{ROOT}[convert,serve,train,video]",
    "nbclient",
    "nbformat",
    "openai",
    "pytest",
    "pytest-socket",
    "pytest-timeout",
    "pytest-xdist",
]


def main() -> int:
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would add the files of an earlier build
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check"]
    upgrade = ["install", "--quiet", "--no-compile", "--upgrade", "--upgrade-strategy", "eager"]
    subprocess.run([*pip, *upgrade, *PACKAGES], check=True)
    RESULTS.parent.mkdir(exist_ok=True)
    tests = [PYTHON, "-m", "pytest", "-m", "newest", "--numprocesses", "2", f"--junitxml={RESULTS}"]
    # in this folder Python imports the installed package, not the source
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # the two workers share two cores
    code = subprocess.run(tests, cwd=ROOT / "tests", env=environment).returncode
    listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
    versions = {_normalize(package["name"]): package["version"] for package in json.loads(listed)}
    line, code = summarize(code, failed_tests(RESULTS) if code else [], versions, seen_versions())
    sys.stdout.write(f"{line}\n")
    return code


def summarize(code: int, failed: list[str], versions: dict, seen: dict) -> tuple[str, int]:
    """The last line of the output, and the exit code.

    Args:
        code: the exit code of pytest.
        failed: names of failed tests.
        versions: the installed version by package.
        seen: by package, the versions with which the tests passed before.
    """
    newer = {name: versions[name] for name in seen if name in versions and versions[name] not in seen[name]}
    releases = ", ".join(f"{name} {version} (seen: {' and '.join(seen[name])})" for name, version in newer.items())
    if code == 0:
        return "The newest releases pass" + (f". Add to constraints-newest.txt: {releases}." if newer else "."), 0
    what = f"{len(failed)} tests fail: {', '.join(failed)}" if failed else f"pytest ended with exit code {code}"
    if newer:
        return f"WARNING: on the newest releases {what}. Newer than those that passed before: {releases}.", 0
    return f"On releases that passed before, {what}.", 1


def failed_tests(results: Path) -> list[str]:
    """Names of the tests that failed or could not start."""
    if not results.exists():
        return []
    cases = ElementTree.parse(results).iter("testcase")
    return [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]


def seen_versions() -> dict[str, list[str]]:
    """Versions by package, from `constraints.txt` and `constraints-newest.txt`."""
    seen = {}
    for name in ("constraints.txt", "constraints-newest.txt"):
        for line in (ROOT / name).read_text().splitlines():
            package, is_pin, version = line.partition("#")[0].partition(";")[0].strip().partition("==")
            if is_pin:
                seen.setdefault(_normalize(package), []).append(version)
    return seen


def _normalize(package: str) -> str:
    return package.lower().replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
