# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The 300 things of the emoji world, with their names in English and the icons that show them."""

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Concept:
    """A thing that can be in a picture.

    Attributes:
        name: as it is said, "hot dog".
        plural: "hot dogs". It is the name where that is a plural: "scissors".
        article: "a", "an", or "" before names that take none.
        category: "animal", "food", "vehicle", ...
        icons: names of the icons that show it, in all sets but FxEmoji.
        fxemoji_icons: names of its icons in FxEmoji, which has names of its own. Some concepts have none.
    """

    name: str
    plural: str
    article: str
    category: str
    icons: tuple[str, ...]
    fxemoji_icons: tuple[str, ...]

    @property
    def with_article(self) -> str:
        """ "a hot dog", "scissors"."""
        return f"{self.article} {self.name}".strip()


def _read() -> dict[str, Concept]:
    with Path(__file__).with_name("concepts.csv").open(encoding="utf-8", newline="") as file:
        return {
            row["name"]: Concept(
                row["name"],
                row["plural"],
                row["article"],
                row["category"],
                tuple(row["icons"].split()),
                tuple(row["fxemoji"].split()),
            )
            for row in csv.DictReader(file)
        }


CONCEPTS = _read()
