"""Bundles on the Hugging Face hub; huggingface_hub is imported when it is needed."""

from __future__ import annotations

import re
from pathlib import Path

from kvsmith.bundle.errors import BundleError, printable, refuse
from kvsmith.bundle.folder import file_size, open_file
from kvsmith.bundle.manifest import MANIFEST, SIZE_LIMIT, read_manifest

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def fetch(
    name: str, revision: str | None, token: str | None, cache_dir: str | Path | None
) -> tuple[Path, Path]:
    """Bring a bundle of the hub into the local hub cache.

    The manifest comes first, so that a repository that is no bundle costs no download.

    Args:
        name: repository `owner/name`.
        revision: branch, tag or commit; None is main.
        token: access token; None is the stored one.
        cache_dir: hub cache; None is the default one.

    Returns:
        The snapshot's folder, and the folder that its links may lead into.

    Raises:
        BundleError: no such repository, no network and not in the cache, or not a bundle.
    """
    if not _NAME.fullmatch(name):
        raise refuse("bundle", "value", "a folder or a hub name owner/name", repr(name))
    snapshot = _download(name, revision, token, cache_dir, [MANIFEST])
    blobs = snapshot.parent.parent / "blobs"
    with open_file(snapshot, MANIFEST, blobs) as file:
        raw = file.read(SIZE_LIMIT + 1) if file_size(file) <= SIZE_LIMIT else b""
    manifest = read_manifest(raw, f"{name}/{MANIFEST}")
    if manifest.files:
        # By commit: the branch may have moved since.
        snapshot = _download(name, snapshot.name, token, cache_dir, sorted(manifest.files))
    return snapshot, blobs


def push(folder: Path, repo_id: str, private: bool | None, token: str | None, message: str) -> str:
    """Upload the files of a bundle; creates the repository where it is missing.

    Args:
        folder: a written bundle.
        repo_id: repository `owner/name`.
        private: of a new repository; None is the account's default.
        token: access token; None is the stored one.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        BundleError: the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            delete_patterns=["*.safetensors"],  # shards of the bundle that was there before
        )
    except (OSError, ValueError) as error:
        raise _hub_error(repo_id, "upload", error) from None
    return str(commit.commit_url)


def _download(
    name: str,
    revision: str | None,
    token: str | None,
    cache_dir: str | Path | None,
    files: list[str],
) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            name, revision=revision, token=token, cache_dir=cache_dir, allow_patterns=files
        )
    except (OSError, ValueError) as error:
        raise _hub_error(name, "download", error) from None
    return Path(path)


def _hub_error(name: str, what: str, error: Exception) -> BundleError:
    reason = f"({type(error).__name__}: {printable(str(error), 120)})"
    remedy = (
        "Check the name, the revision, the access token and the network, or give a local folder."
    )
    return refuse(name, what, "possible", reason, remedy)
