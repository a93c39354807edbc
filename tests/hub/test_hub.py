"""The Hub over HTTP on loopback, with the real client, and with the faults that networks have."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Fault, HubServer
from huggingface_hub import HfApi, constants

import zoo
from zoo import disk, hub
from zoo.disk.layout import CARD, CONFIG, FILES, METRICS, WEIGHTS
from zoo.errors import HubError, UnknownNameError

REPO = "ann/vit-lora"
SMALL = {"pretrained": False, "depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub where "ann-token" is ann's and "bob-token" is bob's; nobody is logged in, and the cache is empty."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "ZOO_HUB_FOLDER", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the Xet protocol is for the real Hub's storage alone
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits seconds between its tries
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.close_session()
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.tokens = {"ann-token": "ann", "bob-token": "bob"}
        yield server
    huggingface_hub.close_session()


def save_small(folder: Path, scale: float = 1.0) -> Path:
    config = {
        "backbone": {"name": "vit-ti16", "fingerprint": None, "kwargs": {}},
        "adapters": [{"name": "lora", "method": "lora", "config": {"rank": 2}, "plan": None}],
        "head": {"num_classes": 2, "classes": ["cat", "dog"]},
    }
    tensors = {"lora/blocks.0.attn.q.lora_a": torch.full((2, 8), scale), "head/weight": torch.eye(2)}
    card = '---\ntags:\n- lora\n---\n\n# Test\n\n```python\nimport zoo\nmodel = zoo.load(adapter="here")\n```\n'
    return disk.write(folder, config, tensors, {"metrics": {"accuracy": 0.5}}, card)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The four files of a small adapter."""
    folder = save_small(tmp_path / "saved")
    return {name: (folder / name).read_bytes() for name in FILES}


def cached_files(tmp_path: Path) -> list[Path]:
    """Everything in the client's cache that a later call could take for a downloaded file."""
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.parent.name == "blobs"]


# -- round trips ------------------------------------------------------------------------------------------------------


def test_push_and_pull_a_folder(server: HubServer, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "saved")
    url = hub.push(folder, REPO, token="ann-token")
    assert url == f"{server.url}/{REPO}"
    repo = server.repos[REPO]
    stored = repo.commits[repo.branches["main"]]
    assert set(stored) == {*FILES, ".gitattributes"}
    assert stored[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert f'zoo.load(adapter="{REPO}")'.encode() in stored[CARD]  # the card says to load the repository
    assert server.count(f"POST /api/models/{REPO}/commit") == 1  # all files in one commit

    pulled = disk.read(hub.pull(REPO))
    torch.testing.assert_close(pulled.tensors, disk.read(folder).tensors, rtol=0, atol=0)
    assert pulled.record == {"metrics": {"accuracy": 0.5}} and not pulled.recovered
    before = len(server.requests)
    hub.pull(REPO)
    assert server.count("GET .*/cdn/") == 1 and len(server.requests) - before <= 2  # the second time from the cache


def test_push_and_load_a_model(server: HubServer) -> None:
    torch.manual_seed(0)
    model = zoo.load("timm:vit_tiny_patch16_224", adapter="lora", num_classes=3, **SMALL)
    for parameter in model.parameters_to_train().values():
        torch.nn.init.normal_(parameter, std=0.1)
    model.classes = ["a", "b", "c"]
    model.push_to_hub(REPO, token="ann-token", revision="v1")
    torch.manual_seed(0)  # the same random backbone
    loaded = zoo.load(adapter=f"{REPO}@v1", pretrained=False)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x)) and loaded.classes == ["a", "b", "c"]


def test_revisions(server: HubServer, tmp_path: Path) -> None:
    hub.push(save_small(tmp_path / "one", 1.0), REPO, token="ann-token")
    first = server.repos[REPO].branches["main"]
    url = hub.push(save_small(tmp_path / "two", 2.0), f"{REPO}@v2", token="ann-token")
    assert url.endswith("/tree/v2") and server.repos[REPO].branches["main"] == first

    def value(**options: str) -> float:
        return disk.read(hub.pull(REPO, **options)).tensors["lora/blocks.0.attn.q.lora_a"][0, 0].item()

    assert (value(), value(revision="v2"), value(revision=first)) == (1.0, 2.0, 1.0)
    hub.push(save_small(tmp_path / "three", 3.0), REPO, token="ann-token")
    assert (value(), value(revision=first)) == (3.0, 1.0)
    with pytest.raises(HubError, match=r"no revision 'v9'"):
        hub.pull(f"{REPO}@v9")


def test_pushing_the_same_twice_makes_no_commit(server: HubServer, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "saved")
    hub.push(folder, REPO, token="ann-token")
    hub.push(folder, REPO, token="ann-token")
    assert server.count(f"POST /api/models/{REPO}/commit") == 1


def test_only_our_files_are_fetched(server: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    server.add(REPO, {**files, "pytorch_model.bin": pickle.dumps([1]), "train.py": b"print()"})
    folder = hub.pull(REPO)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert server.count(r"(bin|py)$") == 0


# -- who may do what --------------------------------------------------------------------------------------------------


def test_private_repository(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push(save_small(tmp_path / "saved"), REPO, private=True, token="ann-token")
    assert server.repos[REPO].private
    with pytest.raises(HubError, match=r"private, and no token was sent.*hf auth login"):
        hub.pull(REPO)
    with pytest.raises(HubError, match=r"the token that was used cannot see it"):
        hub.pull(REPO, token="bob-token")
    with pytest.raises(HubError, match=r"wrong or has expired"):
        hub.pull(REPO, token="no-such-token")
    assert not cached_files(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "ann-token")  # as the client does it
    assert (hub.pull(REPO) / WEIGHTS).exists()


def test_pushing_without_the_right_to(server: HubServer, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "saved")
    with pytest.raises(HubError, match=r"no token is known.*hf auth login"):
        hub.push(folder, REPO)
    with pytest.raises(HubError, match=r"may not write to 'ann/vit-lora'"):
        hub.push(folder, REPO, token="bob-token")
    assert not server.repos


def test_private_is_not_pushed_into_a_public_repository(server: HubServer, tmp_path: Path) -> None:
    commit = server.add(REPO, {"README.md": b"hello"})
    with pytest.raises(HubError, match=r"is public.*nothing was sent"):
        hub.push(save_small(tmp_path / "saved"), REPO, private=True, token="ann-token")
    assert server.repos[REPO].branches["main"] == commit and not server.lfs


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_broken_off_once_is_resumed(server: HubServer, files: dict[str, bytes], name: str) -> None:
    server.add(REPO, files)
    path = "/cdn/" if name == WEIGHTS else name
    server.faults.append(Fault("break", path, times=1))
    folder = hub.pull(REPO)
    assert (folder / name).read_bytes() == files[name]
    assert server.count(f"GET .*{path}") == 2


def test_broken_off_for_good_keeps_nothing(server: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    server.add(REPO, files)
    server.faults.append(Fault("break", "/cdn/"))
    # Half of what is left arrives each time, so the client goes on until a byte is left that never comes.
    with pytest.raises(HubError, match=r"broke off"):
        hub.pull(REPO)
    assert [p.read_bytes() for p in cached_files(tmp_path)] == [files[CONFIG]]
    server.faults.clear()
    assert (hub.pull(REPO) / WEIGHTS).read_bytes() == files[WEIGHTS]


@pytest.mark.parametrize("path", ["/api/models/", f"resolve/.*/{CONFIG}", "/cdn/"])
def test_a_500_once_is_tried_again(server: HubServer, files: dict[str, bytes], path: str) -> None:
    server.add(REPO, files)
    server.faults += [Fault("500", path, times=1), Fault("500", path, method="HEAD", times=1)]
    assert (hub.pull(REPO) / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_a_500_for_good(server: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    server.add(REPO, files)
    for path in ("/api/models/", "/resolve/", "/cdn/"):
        server.faults = [Fault("500", path), Fault("500", path, method="HEAD")]
        with pytest.raises(HubError, match=r"status 500.*try again later"):
            hub.pull(REPO)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_wrong_hash_is_noticed(server: HubServer, files: dict[str, bytes], tmp_path: Path, name: str) -> None:
    server.add(REPO, files)
    path = "/cdn/" if name == WEIGHTS else f"resolve/.*/{name}"
    server.faults.append(Fault("corrupt", path, times=1))
    assert (hub.pull(REPO) / name).read_bytes() == files[name]  # once: fetched again

    other = {**files, name: files[name] + b" "}
    server.add(REPO, other)
    server.faults.append(Fault("corrupt", path))
    with pytest.raises(HubError, match=r"another hash than the Hub states"):
        hub.pull(REPO)
    server.faults.clear()
    assert all(
        p.read_bytes() in (*files.values(), other[name]) for p in cached_files(tmp_path)
    )  # nothing wrong is kept
    assert (hub.pull(REPO) / name).read_bytes() == other[name]


def test_damage_in_the_cache_is_repaired(server: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    server.add(REPO, files)
    weights = (hub.pull(REPO) / WEIGHTS).resolve()
    weights.write_bytes(files[WEIGHTS][:-1] + b"!")
    assert (hub.pull(REPO) / WEIGHTS).read_bytes() == files[WEIGHTS]


@pytest.mark.parametrize("evil", ["../evil", "a/../../evil", "/etc/evil", "..\\evil", "C:\\evil"])
def test_a_name_that_climbs_out_is_refused(
    server: HubServer, files: dict[str, bytes], tmp_path: Path, evil: str
) -> None:
    server.add(REPO, {**files, evil: b"x"})
    with pytest.raises(HubError, match=r"lead out of its folder"):
        hub.pull(REPO)
    assert not cached_files(tmp_path) and not list(tmp_path.rglob("evil"))


def test_what_is_no_adapter(server: HubServer, files: dict[str, bytes]) -> None:
    server.add(REPO, {"README.md": b"hello"})
    with pytest.raises(HubError, match=r"no adapter_config.json and no adapter_model.safetensors.*It holds: README.md"):
        hub.pull(REPO)
    server.add(REPO, {CONFIG: files[CONFIG], "adapter_model.bin": b"\x80\x04"})
    with pytest.raises(HubError, match=r"a pickle \(adapter_model.bin\), which is never read"):
        hub.pull(REPO)
    with pytest.raises(HubError, match=r"no repository 'ann/nothing'"):
        hub.pull("ann/nothing")


def test_without_a_network_the_cache_serves(
    server: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, files)
    online = hub.pull(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens on the discard port
    assert hub.pull(REPO) == online
    with pytest.raises(HubError, match=r"cannot be reached.*not in the cache"):
        hub.pull("ann/other")
    with pytest.raises(HubError, match=r"cannot be reached"):
        hub.push(online, "ann/other", token="ann-token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.pull(REPO) == online


@pytest.mark.parametrize("path", ["/lfs/", "preupload", "/commit/", "/create"])
def test_a_push_survives_a_500_and_fails_whole(server: HubServer, tmp_path: Path, path: str) -> None:
    hub.push(save_small(tmp_path / "one", 1.0), REPO, token="ann-token")
    method = "PUT" if path == "/lfs/" else "POST"
    old = server.repos[REPO].branches["main"]
    server.faults = [Fault("500", path, method=method)]
    with pytest.raises(HubError, match=r"status 500|client refused"):
        hub.push(save_small(tmp_path / "two", 2.0), REPO, token="ann-token")
    assert server.repos[REPO].branches["main"] == old
    server.faults = [Fault("500", path, method=method, times=1)]
    hub.push(tmp_path / "two", REPO, token="ann-token")
    stored = server.repos[REPO].commits[server.repos[REPO].branches["main"]]
    assert stored[WEIGHTS] == (tmp_path / "two" / WEIGHTS).read_bytes()


# -- names and folders ------------------------------------------------------------------------------------------------


def test_parse_repo_id() -> None:
    assert hub.parse_repo_id("ann/x") == ("ann/x", None)
    assert hub.parse_repo_id("ann/x.y-z@feature/a-1") == ("ann/x.y-z", "feature/a-1")
    for bad in (
        "x",
        "a/b/c",
        "ann/",
        "../x",
        "ann/..",
        "ann/x@",
        "ann/x@../main",
        "ann/x@a b",
        "ann/x@-f",
        "a\\b/c",
        "",
    ):
        with pytest.raises(HubError, match=r"user/name|branch, a tag"):
            hub.parse_repo_id(bad)


def test_a_folder_that_stands_for_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shelf = save_small(tmp_path / "saved"), tmp_path / "hub"
    target = hub.publish_to_folder(folder, shelf, REPO)
    assert target == shelf / "ann" / "vit-lora" and sorted(p.name for p in target.iterdir()) == sorted(FILES)
    assert disk.read(hub.pull(REPO, hub_folder=shelf)).card.count(f'"{REPO}"') == 1
    monkeypatch.setenv("ZOO_HUB_FOLDER", str(shelf))
    assert hub.push(folder, "ann/other") == (shelf / "ann" / "other").as_uri()
    assert hub.pull("ann/other") == shelf / "ann" / "other"
    with pytest.raises(HubError, match=r"has no 'ann/othr'.*ann/other"):
        hub.pull("ann/othr")
    with pytest.raises(HubError, match=r"no revisions such as 'v1'"):
        hub.pull("ann/other@v1")
    with pytest.raises(HubError):
        hub.publish_to_folder(folder, shelf, "../../evil")
    with pytest.raises(UnknownNameError, match=r"no adapter 'nothing-like-it'"):
        zoo.load("timm:vit_tiny_patch16_224", adapter="nothing-like-it", **SMALL)


def test_what_the_hub_shows_of_the_card(server: HubServer, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "saved")
    hub.push(folder, REPO, token="ann-token")
    api = HfApi(endpoint=server.url)
    card = huggingface_hub.ModelCard.load(api.hf_hub_download(REPO, CARD))
    assert card.data.tags == ["lora"]
    assert json.loads(Path(api.hf_hub_download(REPO, METRICS)).read_text()) == {"metrics": {"accuracy": 0.5}}
