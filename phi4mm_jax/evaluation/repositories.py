"""The files of a dataset: in a repository on the hub, read in pieces as they are needed, or in a local directory."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import BinaryIO, Protocol

from huggingface_hub import HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from phi4mm_jax.evaluation.items import EvaluationError
from phi4mm_jax.processing.display import shorten

CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps Parquet files that it made of a dataset's other files."""


class Repository(Protocol):
    """Files by their paths in the repository, with slashes. Threads may share it."""

    name: str
    """For messages and results."""

    def paths(self) -> list[str]: ...

    def open(self, path: str) -> BinaryIO: ...

    def explain(self, error: Exception) -> str:
        """One line on why reading failed, and what to do."""


@dataclasses.dataclass(frozen=True)
class LocalRepository:
    """A directory."""

    directory: Path

    @property
    def name(self) -> str:
        return str(self.directory)

    def paths(self) -> list[str]:
        found = []
        for folder, _, names in os.walk(self.directory, followlinks=True):
            found += ((Path(folder) / name).relative_to(self.directory).as_posix() for name in names)
        return sorted(found)

    def open(self, path: str) -> BinaryIO:
        return (self.directory / path).open("rb")

    def explain(self, error: Exception) -> str:
        return f"{self.name}: cannot be read ({shorten(error)})"


@dataclasses.dataclass(frozen=True)
class HubRepository:
    """A dataset's repository at one commit. The hub's client repeats requests that fail for a moment."""

    repo: str
    commit: str
    files: HfFileSystem

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.commit[:12]}"

    @property
    def _root(self) -> str:
        return f"datasets/{self.repo}@{self.commit}/"

    def paths(self) -> list[str]:
        try:
            return [path.removeprefix(self._root) for path in self.files.find(self._root.rstrip("/"))]
        except Exception as error:
            raise EvaluationError(self.explain(error)) from error

    def open(self, path: str) -> BinaryIO:
        return self.files.open(self._root + path, cache_type="none")  # Parquet's reader knows what it needs

    def explain(self, error: Exception) -> str:
        return explain(error, self.repo, self.commit)


def open_repository(repo: str, revision: str | None = None) -> Repository:
    """Finds a dataset's repository on the hub; where fetching is switched off, its copy in the hub's cache.

    Raises:
      EvaluationError: no such repository or revision, no access, or no connection.
    """
    try:
        try:
            commit = HfApi().dataset_info(repo, revision=revision).sha
        except OfflineModeIsEnabled:
            copy = snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
            return LocalRepository(Path(copy))
    except Exception as error:  # a failed connection has no one type: it depends on the version's HTTP library
        raise EvaluationError(explain(error, repo, revision)) from error
    return HubRepository(repo, commit, HfFileSystem())


def explain(error: Exception, repo: str, revision: str | None) -> str:
    """Returns one line on what went wrong with a repository on the hub, and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__) and cause not in causes:  # the client's file system wraps errors
        causes.append(cause)
    for error in causes:
        match error:
            case GatedRepoError():
                return (
                    f"{repo}: access is restricted; accept the terms on its page on the hub, then run "
                    "`hf auth login` or set HF_TOKEN"
                )
            case RepositoryNotFoundError():
                return f"{repo}: no such dataset on the hub (or a private one: set HF_TOKEN)"
            case RevisionNotFoundError():
                return f"{repo}: the dataset has no revision {revision!r}; expected a branch, tag or commit"
            case HFValidationError():
                return f"{repo}: not a valid name of a dataset; expected 'owner/name'"
            case LocalEntryNotFoundError() | OfflineModeIsEnabled():
                return (
                    f"{repo}: not in the hub's cache, and fetching is switched off; go online, run "
                    f"`hf download --repo-type dataset {repo}` once, or name a local copy with --data"
                )
    reason = str(causes[0]).partition("\n")[0]
    return f"{repo}: the hub cannot be read ({shorten(reason, 200)}); try again, or name a local copy with --data"
