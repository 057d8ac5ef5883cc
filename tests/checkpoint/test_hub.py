"""Hub ids: what is asked for, and what is said when nothing comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from statescan.checkpoint import locate
from statescan.errors import CheckpointError, ConfigError, MissingExtraError
from statescan.models import CausalLM, MambaConfig

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of snapshot_download, which gives a folder with a model in it."""
    model = CausalLM(MambaConfig(d_model=8, n_layer=1, vocab_size=11))
    model.save_pretrained(tmp_path / "cache", "state-spaces")
    calls: list[dict[str, Any]] = []

    def download(repository: str, **named: Any) -> str:
        calls.append({"repository": repository, **named})
        return str(tmp_path / "cache")

    monkeypatch.setattr(hub, "snapshot_download", download)
    return calls


def test_a_hub_id_is_fetched(snapshots: list[dict[str, Any]]) -> None:
    model = CausalLM.from_pretrained("owner/some-model.v1", revision="abc123", offline=True)
    assert model.config.d_model == 8
    assert [call["repository"] for call in snapshots] == ["owner/some-model.v1"] * 2
    assert all(call["revision"] == "abc123" and call["local_files_only"] for call in snapshots)
    # Pickles are asked for only after safetensors were not found.
    assert not any(pattern.endswith(".bin") for pattern in snapshots[0]["allow_patterns"])
    assert "pytorch_model.bin" in snapshots[1]["allow_patterns"]


def test_a_folder_here_comes_before_the_hub(
    snapshots: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "whale").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("runs/whale") == Path("runs/whale")
    with pytest.raises(ConfigError, match="a revision is for hub ids"):
        locate("runs/whale", revision="main")
    assert not snapshots


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "/no/such/folder", "../x/y", Path("owner/model")], ids=str)
def test_what_is_no_hub_id(snapshots: list[dict[str, Any]], source: Any) -> None:
    with pytest.raises(CheckpointError, match="which does not exist"):
        locate(source)
    assert not snapshots


@pytest.mark.parametrize("offline", ["argument", "environment"])
def test_offline_with_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str) -> None:
    # The library itself, kept from the network by its own switches.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline == "environment")
    with pytest.raises(CheckpointError) as caught:
        CausalLM.from_pretrained("owner/model", revision="v1", offline=offline == "argument")
    text = str(caught.value)
    assert "could not get 'owner/model' at revision 'v1' from the hub" in text
    assert "pass a folder" in text
    assert "\n" not in text


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **named: Any) -> str:
        raise ConnectionError("Name or service not known\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", broken)
    with pytest.raises(CheckpointError, match=r"ConnectionError: Name or service not known\); check the name"):
        locate("owner/model")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"statescan\[hub\]"):
        locate("owner/model")
