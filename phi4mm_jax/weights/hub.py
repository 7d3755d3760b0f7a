"""Where a checkpoint is: in a local directory, in the package, or on the Hugging Face Hub, which is asked for it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from phi4mm_jax.models.lora import ADAPTERS
from phi4mm_jax.weights.mapping import adapter_of
from phi4mm_jax.weights.reader import ADAPTER_FILE, INDEX_NAME, read_index

CONFIGURATION_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    *(f"{adapter}-lora/adapter_config.json" for adapter in ADAPTERS),
)
"""What a checkpoint has besides tensors."""
_SMALL_FILES = (*CONFIGURATION_FILES, INDEX_NAME)

BUNDLED = {"nano": Path(__file__).parents[1] / "assets" / "nano"}
"""Checkpoints that come with the package."""


class HubError(ValueError):
    """A checkpoint can't be found or fetched; the message says what to do about it."""


def resolve(
    name_or_directory: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    weights: bool = True,
) -> Path:
    """Returns the directory of a checkpoint, after fetching it if needed. A directory goes before a bundled name.

    The adapters' own files (1.6 GB) are fetched only if the shards lack the adapters. HF_HOME, HF_TOKEN, HF_ENDPOINT
    and HF_HUB_OFFLINE work as in any other program.

    Args:
      name_or_directory: an existing directory, used as it is; "nano", the bundled model; or a repository such as
        "microsoft/Phi-4-multimodal-instruct".
      revision: branch, tag or commit; the default is "main".
      token: access token; the default is the one saved by `hf auth login`, False is none.
      local_files_only: fail rather than fetch.
      weights: whether tensors are needed; without, only configuration and tokenizer are fetched.

    Raises:
      HubError: no such directory or repository, no access, or no connection.
      CheckpointError: the repository's index is damaged.
    """
    directory = Path(name_or_directory).expanduser()
    if directory.is_dir():
        return directory
    name = str(name_or_directory)
    if name in BUNDLED:
        return BUNDLED[name]
    if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise HubError(f"{name}: no such directory; expected a checkpoint directory or a repository 'owner/name'")

    def fetch(files: tuple[str, ...], revision: str | None) -> Path:
        try:
            return Path(
                snapshot_download(
                    name, revision=revision, token=token, local_files_only=local_files_only, allow_patterns=list(files)
                )
            )
        except Exception as error:  # a failed connection has no one type: it depends on the version's HTTP library
            raise HubError(_explain(error, name, revision)) from error

    folder = fetch(_SMALL_FILES, revision)
    files = _weight_files(folder) if weights else ()
    if files:
        fetch((*_SMALL_FILES, *files), folder.name)  # the snapshot's commit: a push in between changes nothing
    missing = [file for file in files if not (folder / file).exists()]
    if missing:
        raise HubError(f"{name}: {', '.join(missing)} not in {folder}; go online once to fetch what is missing")
    return folder


def _weight_files(folder: Path) -> tuple[str, ...]:
    """Returns the tensor files that a snapshot needs, given its small files."""
    index = folder / INDEX_NAME
    weight_map = read_index(index) if index.is_file() else {}
    in_shards = {adapter_of(name) for name in weight_map}
    shards = sorted(set(weight_map.values())) or ["model.safetensors"]
    return (*shards, *(f"{adapter}-lora/{ADAPTER_FILE}" for adapter in ADAPTERS if adapter not in in_shards))


def _explain(error: Exception, name: str, revision: str | None) -> str:
    """Returns one line on what went wrong, and what to do."""
    match error:
        case GatedRepoError():
            return (
                f"{name}: access is restricted; accept the terms on its page, then run `hf auth login` or set HF_TOKEN"
            )
        case RepositoryNotFoundError():
            return f"{name}: no such directory, and no such repository on the Hub (or a private one: set HF_TOKEN)"
        case RevisionNotFoundError():
            return f"{name}: the repository has no revision {revision!r}; expected a branch, tag or commit"
        case HFValidationError():
            return f"{name}: no such directory, and not a valid repository name; expected 'owner/name'"
        case LocalEntryNotFoundError() if isinstance(error.__cause__, OfflineModeIsEnabled | None):
            return f"{name}: not in the cache, and fetching is switched off; go online once, or name a local directory"
    reason = str(error).partition("\n")[0].removeprefix("Got: ")
    return (
        f"{name}: the Hub can't be reached ({reason}); if this machine is offline, name a local directory, or fill the "
        "cache elsewhere and set HF_HUB_OFFLINE=1"
    )
