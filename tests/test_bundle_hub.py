"""Bundles of the hub: huggingface_hub is replaced at its two seams, the network is never used."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

import kvsmith
from kvsmith.bundle import Bundle
from kvsmith.bundle.manifest import CARD, MANIFEST, SHARD
from tests.golden import GOLDEN, contents, golden_spec, refusal

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub cache as the library lays it out: files of a snapshot are links to blobs."""
    blobs = tmp_path / "models--ann--cache" / "blobs"
    snapshot = tmp_path / "models--ann--cache" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    calls: list[dict[str, Any]] = []

    def download(name: str, **given: Any) -> str:
        calls.append({"name": name, **given})
        for file in given["allow_patterns"]:
            if not (snapshot / file).is_symlink():
                shutil.copy(GOLDEN / file, blobs / f"blob-{file}")
                (snapshot / file).symlink_to(Path("..") / ".." / "blobs" / f"blob-{file}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return SimpleNamespace(calls=calls, snapshot=snapshot, blobs=blobs)


def test_the_manifest_comes_first_and_the_rest_by_commit(hub_cache: SimpleNamespace) -> None:
    bundle = Bundle.from_pretrained("ann/cache", revision="main", token="secret")
    assert bundle.spec == golden_spec() and bundle.source == "ann/cache"
    first, second = hub_cache.calls
    assert first["allow_patterns"] == [MANIFEST] and first["revision"] == "main"
    assert second["allow_patterns"] == [CARD, SHARD] and second["revision"] == COMMIT
    assert first["token"] == second["token"] == "secret"


def test_a_repository_that_is_no_bundle_is_not_downloaded(hub_cache: SimpleNamespace) -> None:
    (hub_cache.blobs / "x").write_text('{"format": "something"}')
    (hub_cache.snapshot / MANIFEST).symlink_to(hub_cache.blobs / "x")
    message = refusal(lambda: Bundle.from_pretrained("ann/cache"))
    assert "ann/cache/manifest.json" in message and "something else" in message
    assert len(hub_cache.calls) == 1


def test_a_link_out_of_the_hub_cache_is_refused(hub_cache: SimpleNamespace) -> None:
    (hub_cache.snapshot / SHARD).symlink_to(GOLDEN / SHARD)
    assert "a symbolic link" in refusal(lambda: Bundle.from_pretrained("ann/cache"))


def test_a_damaged_download_is_refused(hub_cache: SimpleNamespace) -> None:
    (hub_cache.blobs / "x").write_bytes((GOLDEN / SHARD).read_bytes()[:-1])
    (hub_cache.snapshot / SHARD).symlink_to(hub_cache.blobs / "x")
    assert "size must be 1560" in refusal(lambda: Bundle.from_pretrained("ann/cache"))


def test_a_local_folder_needs_no_hub(hub_cache: SimpleNamespace) -> None:
    for name in (GOLDEN, str(GOLDEN)):
        assert Bundle.from_pretrained(name).spec == golden_spec()
    assert hub_cache.calls == []


def test_absent_and_offline_is_one_line(tmp_path: Path) -> None:
    message = refusal(lambda: Bundle.from_pretrained("ann/nothing", cache_dir=tmp_path))
    assert "ann/nothing: download must be possible" in message and "local folder" in message
    for name in ("nothing", "a/b/c", "../x", "ann/x y", "https://x.org/a"):
        assert "a folder or a hub name" in refusal(lambda n=name: Bundle.from_pretrained(n))
    assert "existing folder" in refusal(lambda: Bundle.from_pretrained(tmp_path / "none"))


class FakeApi:
    """Records what the hub would have been asked."""

    calls: list[tuple[str, dict[str, Any]]] = []
    fails = False

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **given: Any) -> None:
        if self.fails:
            raise OSError("403 Forbidden\nrequest id 1")
        self.calls.append(("create", {"repo_id": repo_id, "token": self.token, **given}))

    def upload_folder(self, *, folder_path: Path, **given: Any) -> SimpleNamespace:
        self.calls.append(("upload", {"files": contents(Path(folder_path)), **given}))
        return SimpleNamespace(commit_url="https://hub/ann/cache/commit/1")


def test_pushing_uploads_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "calls", [])
    url = kvsmith.load(GOLDEN).push_to_hub("ann/cache", private=True, token="secret")
    assert url == "https://hub/ann/cache/commit/1"
    (_, create), (_, upload) = FakeApi.calls
    assert create == {"repo_id": "ann/cache", "token": "secret", "private": True, "exist_ok": True}
    assert upload["files"] == contents(GOLDEN) and upload["repo_id"] == "ann/cache"
    assert upload["delete_patterns"] == ["*.safetensors"] and upload["commit_message"]


def test_a_hub_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(FakeApi, "fails", True)
    message = refusal(lambda: kvsmith.load(GOLDEN).push_to_hub("ann/cache"))
    assert "ann/cache: upload must be possible, got (OSError: 403 Forbidden request" in message


def test_offline_a_cached_bundle_loads_through_the_real_library(tmp_path: Path) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    repo = tmp_path / "models--ann--cache"
    snapshot = repo / "snapshots" / COMMIT
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    for name in (MANIFEST, CARD, SHARD):
        shutil.copy(GOLDEN / name, repo / "blobs" / name[::-1])
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name[::-1])
    bundle = Bundle.from_pretrained("ann/cache", cache_dir=tmp_path)
    assert bundle.spec == golden_spec() and len(bundle.parameters) == 12
    assert Bundle.from_pretrained("ann/cache", COMMIT, cache_dir=tmp_path).source == "ann/cache"
    assert "possible" in refusal(
        lambda: Bundle.from_pretrained("ann/cache", "v2", cache_dir=tmp_path)
    )
