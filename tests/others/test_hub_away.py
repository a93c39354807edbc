"""Where the Hub is away, libraries look into the cache alone and say so at once: one try of a connection, none again."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
from huggingface_hub import constants

import zoo
from zoo import library
from zoo.errors import ConfigError, UnknownNameError


@pytest.fixture
def tries(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Connections that were tried; there is no network in here."""
    made: list[Any] = []

    def refused(place: Any, *rest: Any) -> socket.socket:
        made.append(place)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(library, "getproxies", dict)
    monkeypatch.setattr(library, "_reached", (-library.HELD, "", None))
    monkeypatch.setattr(library, "_held", {})
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    return made


def test_a_name_is_looked_up_once(tries: list[Any]) -> None:
    before, began = constants.is_offline_mode, time.monotonic()
    with pytest.raises(UnknownNameError, match=r"The Hub cannot be reached \(hub.invalid: Network is unreachable\)"):
        zoo.load("transformers:someone/nothing", num_classes=0)
    with pytest.raises(UnknownNameError, match="The Hub cannot be reached"):
        zoo.load("diffusers:someone/nothing", num_classes=0)
    assert tries == [("hub.invalid", 443)] and time.monotonic() - began < library.HELD
    assert constants.is_offline_mode is before


def test_weights_that_are_not_here(tries: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"cannot be reached .* not in the cache. .* pretrained=False gives random ones"
    ):
        zoo.load("groupmamba-t", num_classes=0)
    assert len(tries) == 1 and not constants.is_offline_mode()


def test_what_is_on_this_disk_asks_no_network(tries: list[Any]) -> None:
    assert zoo.load("vit-micro", num_classes=0).family.pretrained and tries == []


def test_a_switch_of_the_users_own_keeps_its_words(tries: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownNameError, match="could not be read: LocalEntryNotFoundError"):
        zoo.load("transformers:someone/nothing", num_classes=0)
    assert tries == []


def test_contexts_in_contexts(tries: list[Any]) -> None:
    before = constants.is_offline_mode
    with library.reaching():
        with library.reaching():
            assert constants.is_offline_mode()
        assert constants.is_offline_mode()
        with pytest.raises(KeyError), library.reaching():
            raise KeyError("an error of another kind stays as it is")
    assert constants.is_offline_mode is before and not library._open


def test_a_function_taken_along_works_outside(tries: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that are first imported inside hold the client's function by name."""
    with library.reaching():
        taken = constants.is_offline_mode
        assert taken() and len(tries) == 1
    assert not taken() and len(tries) == 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert taken()


@pytest.mark.parametrize(
    ("name", "part"), [("qwen2-vl-2b", "processor"), ("whisper-b", "tokenizer"), ("vl-t5", "tokenizer")]
)
def test_words_of_texts_are_asked_for_once(
    name: str, part: str, tries: list[Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = zoo.load(name, pretrained=False, device="meta")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="could not be loaded"):
        getattr(model.family, part)
    assert len(tries) == 1 and time.monotonic() - began < library.HELD
