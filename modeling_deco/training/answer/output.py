# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The folder that answers are written to, shard by shard, by any number of processes.

A shard is a range of rows, and is answered as a whole: it gets its name when it is complete, and what a killed process
had of it is answered again. A process locks the shard that it answers; the system unlocks it when the process ends,
however it ends. The shards lie in a folder `.incomplete`, until the last one is there and the folder becomes `data`.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import xxhash
from filelock import FileLock, Timeout

from ...utils.files import read_json
from ...utils.staging import INCOMPLETE, staged_file
from ..data.build import row_groups, write_card
from ..data.columns import FEATURES
from .answerer import Answered

MANIFEST = "answers.json"
_FACTS = b"answers"  # the key of a shard's counts and faults in the metadata of its file


class Output:
    """The folder of a run. To construct one creates it, or continues the run that it has.

    Args:
        folder: where the data are written.
        settings: everything that the answers depend on. It is the beginning of the manifest, `answers.json`.
        num_rows: of the source.
        shard_size: rows of a shard.

    Raises:
        ValueError: the folder has other files, or a run with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], num_rows: int, shard_size: int):
        self.folder, self.settings, self.num_rows, self.shard_size = folder, settings, num_rows, shard_size
        self.data, self.workspace = folder / "data", folder / INCOMPLETE
        self.num_shards = -(-num_rows // shard_size)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out {folder} is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.workspace / "lock"):
            manifest = folder / MANIFEST
            if manifest.exists():
                self._check(read_json(manifest))
            elif others := sorted(path.name for path in folder.iterdir() if path.name != INCOMPLETE):
                raise ValueError(f"--out {folder} has other files, such as {others[0]}; name an empty folder.")
            else:
                self._write_manifest({})
        if self.is_finished:
            self._clean()

    def _check(self, manifest: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            if manifest.get(name) != value:
                raise ValueError(
                    f"--out {self.folder} has answers of a run with {name} {manifest.get(name)!r}, not {value!r}. "
                    f"Continue it with its own arguments, or name another folder."
                )

    def _write_manifest(self, results: dict[str, Any]) -> None:
        with staged_file(self.folder / MANIFEST) as incomplete:
            incomplete.write_text(json.dumps(self.settings | results, indent=1) + "\n")

    @property
    def is_finished(self) -> bool:
        return self.data.is_dir()

    def rows_of(self, shard: int) -> range:
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def _file(self, shard: int) -> Path:
        return self.workspace / "data" / f"train-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def complete_shards(self) -> list[int]:
        return [shard for shard in range(self.num_shards) if self._file(shard).is_file()]

    @contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Lock a shard. Yields whether it is to be answered: it is neither complete nor locked by another process."""
        if self.is_finished or self._file(shard).is_file():
            yield False
            return
        lock = FileLock(self.workspace / f"{shard:05d}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield not self.is_finished and not self._file(shard).is_file()
        finally:
            lock.release()

    def write(self, shard: int, answered: Answered) -> None:
        """Write a shard that is claimed."""
        digest = xxhash.xxh3_128()
        for row in answered.rows:
            digest.update(json.dumps([row["id"], row["messages"]]).encode())
        facts = {**answered._asdict(), "rows": len(answered.rows), "xxh3_128": digest.hexdigest()}
        schema = FEATURES.arrow_schema
        metadata = schema.metadata | {_FACTS: json.dumps(facts).encode()}
        file = self._file(shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(file) as incomplete:
            with pq.ParquetWriter(incomplete, schema.with_metadata(metadata)) as writer:
                for group in row_groups(iter(answered.rows)):
                    writer.write_table(group.replace_schema_metadata(metadata))

    def finish(self) -> dict[str, Any] | None:
        """The manifest of the complete data, or None while other processes answer shards.

        Raises:
            ValueError: no row has an answer.
        """
        if self.is_finished:
            self._clean()
            return read_json(self.folder / MANIFEST)
        with FileLock(self.workspace / "lock"):
            if not self.is_finished:
                if len(self.complete_shards()) < self.num_shards:
                    return None
                self._finish()
        self._clean()
        return read_json(self.folder / MANIFEST)

    def _finish(self) -> None:
        num_rows, counts, kinds, faults, digest = 0, Counter[str](), Counter[str](), [], xxhash.xxh3_128()
        for shard in range(self.num_shards):
            stored = pq.read_schema(self._file(shard)).metadata[_FACTS]
            digest.update(stored)
            facts = json.loads(stored)
            num_rows += facts["rows"]
            counts.update(facts["counts"])
            kinds.update(facts["kinds"])
            faults += facts["faults"]
        if num_rows == 0:
            more = f"; {faults[0]}" if faults else ""
            raise ValueError(f"None of the {counts['questions']:,} questions has an answer{more}.")
        self._write_manifest(
            {
                "rows": num_rows,
                "counts": {name: counts[name] for name in ("questions", "answers", "empty", "unanswered", "cut")},
                "kinds": dict(sorted(kinds.items())),
                "faults": faults,
            }
        )
        about = (
            f"Answers of {self.settings['model']} at {self.settings['pooled_grid_size']} to questions about the "
            f"pictures of {self.settings['images']}.\n\n- {num_rows:,} rows\n- {counts['answers']:,} answers of "
            f"{counts['questions']:,} questions; `{MANIFEST}` lists what is left out"
        )
        write_card(self.folder, str(self.settings["images"]), about, digest.hexdigest())
        for path in self.workspace.glob(f"data/*{INCOMPLETE}"):
            path.unlink()
        (self.workspace / "data").rename(self.data)

    def _clean(self) -> None:
        shutil.rmtree(self.workspace, ignore_errors=True)
