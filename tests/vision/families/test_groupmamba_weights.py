"""GroupMamba: weights files, the released key layout, names; the loss of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import zoo
from vision.families.groupmamba.family import MODELS, WEIGHTS, load_released
from vision.families.groupmamba.network import GroupMamba
from vision.tasks.distill import distillation_loss
from zoo.errors import ConfigError, MismatchError, WeightsError

TINY: dict[str, Any] = {
    "stem_hidden_dim": 8,
    "embed_dims": [16, 32],
    "depths": [1, 2],
    "mlp_ratios": [2, 2],
    "img_size": 16,
}


def images() -> Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def released(tmp_path: Path, prefix: str = "", **options: Any) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(3)
    network = GroupMamba(num_classes=100, stem_kernel=3, stem_stride=1, **{**TINY, **options})
    state = {k: v.clone() for k, v in network.state_dict().items()}
    save_file({prefix + k: v for k, v in state.items()}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", state


def from_file(weights: Path, num_classes: int | None = None) -> zoo.Model:
    return zoo.load("groupmamba-micro", num_classes=num_classes, weights=str(weights), **TINY)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_reads_a_file_or_a_folder_of_the_released_layout(prefix: str, tmp_path: Path) -> None:
    file, state = released(tmp_path, prefix)
    for source in (file, tmp_path):
        merged = from_file(source).merge()
        assert merged.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in merged.state_dict().items())
    assert load_released(file).keys() == state.keys()
    assert from_file(file, num_classes=3).num_classes == 3


def test_full_size_layout_loads_without_a_missing_key(tmp_path: Path) -> None:
    """A checkpoint with the keys and shapes of groupmamba-t; half precision, as a smaller file."""
    network = zoo.load("groupmamba-t", pretrained=False, device="meta").merge()
    state = {k: torch.full(v.shape, 0.01, dtype=torch.float16) for k, v in network.state_dict().items()}
    save_file(state, tmp_path / "t.safetensors")
    model = zoo.load("groupmamba-t", weights=str(tmp_path / "t.safetensors"))
    assert model.num_parameters() == 23_361_917
    value = torch.tensor(0.01).half().float()
    assert all(bool((p == value).all()) for p in model.parameters())


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file, state = released(tmp_path)
    with pytest.raises(MismatchError, match="unknown"):
        zoo.load("groupmamba-micro", weights=str(file), **{**TINY, "depths": [1, 1]})
    with pytest.raises(MismatchError, match="missing"):
        zoo.load("groupmamba-micro", weights=str(file), **{**TINY, "depths": [2, 2]})
    with pytest.raises(MismatchError, match="another shape"):
        zoo.load("groupmamba-micro", weights=str(file), **{**TINY, "mlp_ratios": [2, 4]})
    state["norm1.weight"][0] = float("nan")
    save_file(state, file)
    with pytest.raises(WeightsError, match=r"norm1.weight"):
        from_file(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="whole"):
        from_file(file)
    with pytest.raises(ConfigError, match="no weights file"):
        from_file(tmp_path / "none.safetensors")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    for name in ("groupmamba_tiny.pth", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"not even a pickle")
        with pytest.raises(ConfigError, match="save_file"):
            from_file(tmp_path / name)
    with pytest.raises(ConfigError, match="save_file"):
        from_file(tmp_path)


def test_pretrained_asks_the_authors_repository_for_safetensors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []

    def download(repo: str, file: str) -> str:
        asked.append((repo, file))
        raise OSError("no such entry")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ConfigError, match=r"no such entry.*save_file"):
        zoo.load("groupmamba-s")
    assert asked == [("Abdelrahman-shaker/GroupMamba-Small", "model.safetensors")]


def test_weights_of_the_small_member() -> None:
    if (WEIGHTS / "groupmamba-micro.safetensors").is_file():
        model = zoo.load("groupmamba-micro")
        assert model.family.licence() == "apache-2.0" and model.num_classes == 100
    else:
        with pytest.raises(ConfigError, match=r"without weights of 'groupmamba-micro'.*pretrained=False"):
            zoo.load("groupmamba-micro")


def test_names() -> None:
    assert set(MODELS) <= set(zoo.list_backbones("groupmamba-*"))
    assert zoo.load("zoo:groupmamba-s", pretrained=False, device="meta").num_parameters() == 34_781_555


# -- distillation ---------------------------------------------------------------------------------------------------------


def test_distillation_loss() -> None:
    torch.manual_seed(0)
    own, distilled, teacher = torch.randn(3, 4, 5).unbind(0)
    labels = torch.tensor([0, 3, 2, 4])
    decided = teacher.argmax(dim=1)
    expected = 0.0
    for i in range(4):
        expected -= 0.5 * float(own[i].log_softmax(0)[labels[i]] + distilled[i].log_softmax(0)[decided[i]]) / 4
    assert float(distillation_loss((own, distilled), labels, teacher)) == pytest.approx(expected, rel=1e-5)
    mixed = F.one_hot(labels, 5).float() * 0.7 + 0.06
    loss = distillation_loss((own, distilled), mixed, teacher, alpha=0.0)
    torch.testing.assert_close(loss, -(mixed * own.log_softmax(1)).sum(1).mean())


def test_distillation_trains_both_heads() -> None:
    network = GroupMamba(num_classes=4, **TINY).train()
    teacher = torch.randn(3, 4, requires_grad=True)
    distillation_loss(network(images()), torch.tensor([0, 1, 2]), teacher).backward()
    assert teacher.grad is None
    assert all(p.grad is not None for p in network.parameters())


def test_distillation_needs_two_heads() -> None:
    network = GroupMamba(num_classes=4, distillation=False, **TINY).train()
    labels, teacher = torch.tensor([0, 1, 2]), torch.randn(3, 4)
    with pytest.raises(ConfigError, match="two heads"):
        distillation_loss(network(images()), labels, teacher)
    with pytest.raises(ConfigError, match="different shapes"):
        distillation_loss((teacher, teacher), labels, torch.randn(3, 5))
    with pytest.raises(ConfigError, match="alpha"):
        distillation_loss((teacher, teacher), labels, teacher, alpha=2.0)
