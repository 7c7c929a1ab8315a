# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The conversion report: where each tensor of a converted checkpoint comes from."""

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from .sources import Source
from .tensors import OutputTensor
from .writing import Digests

REPORT = "conversion_report.json"


def build_report(
    tensors: Mapping[str, OutputTensor],
    sources: dict[str, Source],
    files: list[Path],
    facts: dict,
    digests: Digests,
) -> dict:
    """What `conversion_report.json` holds.

    Args:
        tensors: the written tensors, by name.
        sources: the folders that were read, by role.
        files: the files that were read, in these folders.
        facts: entries of this conversion, such as its format and grid.
        digests: of all tensors and files.
    """
    return {
        "source": sources["source"].name,
        "revision": sources["source"].revision,
        **facts,
        "sources": {
            role: {
                "name": source.name,
                "revision": source.revision,
                "files": {
                    path.name: {"bytes": path.stat().st_size, "xxh3_128": digests.source_files[path]}
                    for path in files
                    if path.parent == source.folder
                },
            }
            for role, source in sources.items()
        },
        "written": digests.files,
        "nonfinite": digests.nonfinite,
        "tensors": {
            name: {
                "key": tensor.key,
                "file": tensor.path.name,
                "how": tensor.how,
                "xxh3_128": digests.tensors[name],
            }
            for name, tensor in tensors.items()
        },
        "versions": {
            "modeling-deco": __version__,
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("torch", "transformers", "safetensors", "huggingface_hub")},
        },
    }
