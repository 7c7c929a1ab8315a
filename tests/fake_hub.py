# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""A Hub without a network: what is committed to it lies in a cache laid out as huggingface_hub lays it out.

models--org--name/blobs/<sha256>                the files
models--org--name/snapshots/<commit>/<path>     links to them
models--org--name/refs/<branch>                 the branch's commit
"""

import hashlib
import os
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

from huggingface_hub import HfApi
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects


class FakeHub:
    """Repositories in the folder `cache`; tests point `HF_HUB_CACHE` there."""

    def __init__(self, cache: Path):
        self.cache = Path(cache)
        self.created, self.messages = {}, []  # what create_repo was asked for, and the commits' messages

    def install(self, monkeypatch) -> "FakeHub":
        """Let this process read from the cache, and push to it."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.cache))

        def create_repo(api, repo_id, **kwargs):
            self.created[repo_id] = kwargs
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(api, repo_id, *, branch, **kwargs):
            head = self.head(repo_id)
            if head is not None and self.head(repo_id, branch) is None:
                self._storage(repo_id).joinpath("refs", branch).write_text(head)

        def create_commit(api, repo_id, operations, *, commit_message, revision=None, **kwargs):
            self.messages.append(commit_message)
            files = {operation.path_in_repo: _content(operation.path_or_fileobj) for operation in operations}
            return self.commit(repo_id, files, revision or "main")

        def upload_folder(
            api, *, repo_id, folder_path, ignore_patterns=None, revision=None, run_as_future=False, **kwargs
        ):
            names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            names = filter_repo_objects(names, ignore_patterns=ignore_patterns)
            files = {name: Path(folder_path, name).read_bytes() for name in names}
            commit = Future()
            commit.set_result(self.commit(repo_id, files, revision or "main"))
            return commit if run_as_future else commit.result()

        for function in (create_repo, create_branch, create_commit, upload_folder):
            monkeypatch.setattr(HfApi, function.__name__, function)
        return self

    def commit(self, repo_id: str, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """Put files, by name or all of a folder, on top of a branch's; returns the commit."""
        if not isinstance(files, dict):
            files = {
                str(path.relative_to(files)): path.read_bytes() for path in Path(files).rglob("*") if path.is_file()
            }
        storage, head = self._storage(repo_id), self.head(repo_id, branch)
        blobs = {} if head is None else self.blobs(repo_id, head)
        (storage / "blobs").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            blobs[name] = hashlib.sha256(content).hexdigest()
            (storage / "blobs" / blobs[name]).write_bytes(content)
        commit = hashlib.sha1(repr((head, sorted(blobs.items()))).encode()).hexdigest()
        for name, blob in blobs.items():
            link = storage / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(storage / "blobs" / blob, link.parent))
        ref = storage / "refs" / branch
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        return commit

    def head(self, repo_id: str, branch: str = "main") -> str | None:
        ref = self._storage(repo_id) / "refs" / branch
        return ref.read_text() if ref.exists() else None

    def snapshot(self, repo_id: str, branch: str = "main") -> Path:
        """The folder of a branch's files."""
        return self._storage(repo_id) / "snapshots" / self.head(repo_id, branch)

    def blobs(self, repo_id: str, commit: str) -> dict[str, str]:
        folder = self._storage(repo_id) / "snapshots" / commit
        return {str(path.relative_to(folder)): path.resolve().name for path in folder.rglob("*") if path.is_file()}

    def _storage(self, repo_id: str) -> Path:
        return self.cache / repo_folder_name(repo_id=repo_id, repo_type="model")


def _content(path_or_fileobj) -> bytes:
    return path_or_fileobj if isinstance(path_or_fileobj, bytes) else Path(path_or_fileobj).read_bytes()
