"""Polyhistor and Polyhistor-Lite: the forward written out, factors, kernels, made once, a task taken out, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dense_data import dense_model, pairs
from dense_data import images as dense_images
from method_models import bare, images, shake
from torch import Tensor

import zoo
from vision.data.dense import open_dense
from zoo.adapters.parts.hypernetwork import BottleneckMaker
from zoo.adapters.parts.kronecker import kronecker_sum
from zoo.errors import AttachError, ConfigError, ContextError, MergeError, UnknownNameError
from zoo.regimes.multitask import single_task

SMALL: dict[str, Any] = {"rank": 4, "inner": 2, "task_dim": 4, "hidden": 8, "projected": 6}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "block": ("polyhistor", {}),
    "stage": ("polyhistor", {"per": "stage"}),
    "whole": ("polyhistor", {"decomposed": False, "inner": None}),
    "lite": ("polyhistor-lite", {}),
    "template": ("polyhistor-lite", {"order": "template"}),
    "normed": ("polyhistor-lite", {"embedding_norm": True}),
}
forms = pytest.mark.parametrize("form", list(FORMS))


def attached(form: str, family: str = "swin", **settings: Any) -> zoo.Model:
    name, own = FORMS[form]
    model = bare(family)
    torch.manual_seed(2)
    model.add_adapter(zoo.adapter(name, **{**SMALL, "targets": ["attn", "mlp"], **own, **settings}), "poly")
    return model


def of_task(model: zoo.Model, task: str) -> Tensor:
    with torch.no_grad():
        return model(images(), context={"task": task})


@forms
@pytest.mark.parametrize("insert", ["serial", "parallel"])
def test_forward_written_out(form: str, insert: str) -> None:
    """The weights of each point by their equations, from the state alone, and what they compute there by torch's hooks."""
    model = attached(form, tasks=("a", "b"), insert=insert)
    shake(model, "poly")
    expected = of_task(model, "b")
    hyper = model.adapters["poly"].hyper
    s = hyper.state_dict()

    def affine(x: Tensor, key: str) -> Tensor:
        return x @ s[f"{key}.weight"].T + s[f"{key}.bias"]

    def embedding(rows: list[Tensor], stack: str) -> Tensor:
        e = affine(affine(torch.cat(rows), f"{stack}.projector.into").relu(), f"{stack}.projector.out")
        norm = f"{stack}.projector.norm"
        return F.layer_norm(e, (6,), s[f"{norm}.weight"], s[f"{norm}.bias"], 1e-6) if f"{norm}.weight" in s else e

    def made(e: Tensor, maps: str, d: int, b: int) -> list[Tensor]:
        """W_down, b_down, W_up, b_up, gamma, beta."""
        found = []
        for name, rows, columns in (("down", b, d), ("up", d, b)):
            m = affine(e, f"{maps}.{name}")
            if form == "whole":
                found.append(m.view(rows, columns))
            else:
                found.append(m[: 2 * rows].view(rows, 2) @ m[2 * rows :].view(2, columns))
            found.append(affine(e, f"{maps}.{name}_bias"))
        return [*found, affine(e, f"{maps}.scale"), affine(e, f"{maps}.shift")]

    def weights(block: int, kind: int) -> list[Tensor]:
        """On two stages of two blocks each, 24 and 48 wide."""
        stage, task = block // 2, s["tasks"][1]
        d = 24 * 2**stage
        if form in ("block", "whole"):
            return made(embedding([task], f"stacks.{block}"), f"stacks.{block}.makers.{kind}", d, 4)
        if form == "stage":
            rows = [task, s[f"stacks.{stage}.layers"][block % 2], s[f"stacks.{stage}.kinds"][kind]]
            return made(embedding(rows, f"stacks.{stage}"), f"stacks.{stage}.makers.0", d, 4)
        stretch = f"stacks.0.stretches.{stage}"
        templates = []
        for layer in s[f"{stretch}.layers"][block % 2]:
            e = embedding([task, layer, s["stacks.0.kinds"][kind]], "stacks.0")
            templates.append(made(e, "stacks.0.maker", 24, 4))
        if stage == 0:
            return templates[0]
        point = 2 * (block % 2) + kind
        out = []
        for i in range(6):
            name = "kernel" if i in (0, 2) else "bias_kernel" if i in (1, 3) else "norm_kernel"
            total = torch.zeros(())
            for kernel, template in zip(s[f"{stretch}.{name}"][point], templates, strict=True):
                pair = (kernel, template[i]) if form != "template" else (template[i], kernel)
                total = total + torch.kron(*pair)
            out.append(total)
        return out

    def branch(x: Tensor, block: int, kind: int) -> Tensor:
        down, down_bias, up, up_bias, gamma, beta = weights(block, kind)
        z = F.silu(x @ down.T + down_bias) @ up.T + up_bias
        return F.layer_norm(z, (x.shape[-1],), gamma, beta)

    model.set_active()
    swin: Any = model.backbone
    blocks = [b for layer in swin.layers for b in layer.blocks]
    inputs: dict[str, Tensor] = {}
    hooks = []
    for number, block in enumerate(blocks):
        for kind, (norm, sublayer) in enumerate(((block.norm1, None), (block.norm2, block.mlp))):
            residual = f"{number}.{kind}"
            hooks.append(norm.register_forward_pre_hook(lambda _, x, k=residual: inputs.__setitem__(k, x[0])))

            def added(_: Any, __: Any, y: Tensor, number: int = number, kind: int = kind, k: str = residual) -> Tensor:
                source = y if insert == "serial" else inputs[k].reshape(y.shape)
                return y + branch(source, number, kind)

            # timm's attention of shifted windows is a method of the block, in front of drop_path1, which is an identity
            target = block.drop_path1 if sublayer is None else sublayer
            hooks.append(target.register_forward_hook(added))
    with torch.no_grad():
        written = model(images())
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(written, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(images()), expected)


def test_a_backbone_of_one_width_needs_no_kernels() -> None:
    """There Lite is Polyhistor with one network for the stage, tensor by tensor."""
    lite, stage = attached("lite", "vit"), attached("stage", "vit")
    assert lite.num_parameters(trainable=True, head=False) == stage.num_parameters(trainable=True, head=False)
    shake(lite, "poly")
    found = {k.replace(".maker.", ".makers.0."): v for k, v in lite.adapters["poly"].hyper.state_dict().items()}
    found["stacks.0.layers"] = found.pop("stacks.0.stretches.0.layers").squeeze(1)
    stage.adapters["poly"].hyper.load_state_dict(found)
    with torch.no_grad():
        torch.testing.assert_close(stage(images()), lite(images()))


@pytest.mark.parametrize(("inner", "rank"), [(1, 1), (3, 3), (5, 5), (8, 5)])
def test_rank_of_what_factors_make(inner: int, rank: int) -> None:
    torch.manual_seed(0)
    made = BottleneckMaker(6, 12, 5, inner)(torch.randn(2, 6))
    for matrix in (*made.down.double(), *made.up.double()):
        assert torch.linalg.matrix_rank(matrix, rtol=1e-5) == rank


def test_the_orders_differ_by_a_permutation() -> None:
    kernels, templates = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 5, 2)
    front, back = kronecker_sum(kernels, templates), kronecker_sum(templates, kernels)
    assert front.shape == back.shape == (4, 15, 6)
    rows = torch.arange(15).view(3, 5).T.flatten()
    columns = torch.arange(6).view(3, 2).T.flatten()
    torch.testing.assert_close(front[:, rows][:, :, columns], back)


def test_kernels_that_select_set_templates_as_blocks() -> None:
    kernels = torch.zeros(2, 2, 2)
    kernels[0, 0, 1] = kernels[1, 1, 0] = 1
    templates = torch.randn(2, 3, 4)
    expected = torch.zeros(6, 8)
    expected[:3, 4:], expected[3:, :4] = templates
    assert torch.equal(kronecker_sum(kernels, templates), expected)


@forms
def test_made_once_for_each_step(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(form, tasks=("a", "b")).train()
    model.memory = "min"
    hyper, runs = model.adapters["poly"].hyper, []
    monkeypatch.setattr(hyper, "forward", lambda task, run=hyper.forward: runs.append(task) or run(task))
    for task in ("a", "b"):
        model(images(), context={"task": task}).square().sum().backward()
    assert runs == ["a", "b"]


@pytest.mark.parametrize("form", [form for form in FORMS if form != "normed"])
def test_start_is_close(form: str) -> None:
    """gamma and beta are made, and small."""
    model = attached(form)
    made = model.adapters["poly"].hyper(None)
    assert all(float(w.norm.detach().abs().max()) < 0.01 for w in made.values())
    with torch.no_grad():
        adapted = model(images())
        with model.disable():
            plain = model(images())
    assert 0 < float((adapted - plain).norm() / plain.norm()) < 0.02


@forms
@pytest.mark.parametrize("insert", ["serial", "parallel"])
def test_a_task_taken_out_is_a_plain_adapter(form: str, insert: str, tmp_path: Path) -> None:
    model = attached(form, tasks=("a", "b"), insert=insert)
    shake(model, "poly")
    expected = of_task(model, "b")
    names = model.adapters["poly"].extract(model, "b", "only-b")
    assert names == ("only-b",)
    model.save_adapter(tmp_path / "b", adapters=names)
    torch.manual_seed(0)
    plain = zoo.load(adapter=tmp_path / "b", pretrained=False)
    assert plain.adapters["only-b"].method == "adapter" and not plain.wanted
    with torch.no_grad():
        torch.testing.assert_close(plain(images()), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(UnknownNameError, match="no task 'c'"):
        model.adapters["poly"].extract(model, "c")
    with pytest.raises(MergeError, match="extract"):
        model.merge()


@pytest.mark.parametrize("method", ["polyhistor", "polyhistor-lite"])
def test_defaults_stand_behind_the_mlps(method: str) -> None:
    adapter = bare("swin").add_adapter(method)
    assert [name.rpartition(".")[2] for name in adapter.hyper("default")] == ["mlp"] * 4


def test_tasks_are_asked_for_and_checked() -> None:
    model = attached("lite", tasks=("segment", "edges"))
    with pytest.raises(ContextError, match="needs 'task'"):
        model(images())
    with pytest.raises(UnknownNameError, match=r"knows no task 'edge'.*edges"):
        model(images(), context={"task": "edge"})


@pytest.mark.parametrize("method", ["polyhistor", "polyhistor-lite"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ()}, "tasks is empty"),
        ({"tasks": ("a", "b", "a")}, "one twice.*Name 'a' once"),
        ({"tasks": ("a", "")}, "empty name"),
        ({"rank": 0}, "rank is 0"),
        ({"reduction": 4.0}, "both given"),
        ({"inner": 0}, "inner is 0"),
        ({"inner_reduction": 2.0}, "inner and inner_reduction"),
        ({"inner": None, "inner_reduction": -1.0}, "inner_reduction is -1"),
        ({"hidden": 0}, "hidden is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(method: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.adapter(method, **{**SMALL, **settings})


def test_factors_of_whole_matrices_are_refused() -> None:
    with pytest.raises(ConfigError, match="whole matrices have no factors"):
        zoo.adapter("polyhistor", decomposed=False, inner=2)


def test_widths_that_no_template_stretches_to_are_refused() -> None:
    method: Any = zoo.adapter("polyhistor-lite", **SMALL)
    points = [SimpleNamespace(name=f"blocks.{i}.mlp", block=i, tower="", dim_out=d) for i, d in enumerate((24, 40))]
    with pytest.raises(AttachError, match=r"'blocks.1.mlp' is 40 wide, no multiple of the narrowest width 24"):
        method.hypernetwork(points)


def test_several_dense_tasks_and_one_taken_out(tmp_path: Path) -> None:
    """Maps of classes, edges and distances learnt at once; one task's decoder and plain adapters say the same alone."""
    images_, names = pairs(6), ("parts", "edges", "far")
    data = {
        "parts": open_dense(images_, classes=["dark", "bright"]),
        "edges": open_dense(images_, "edges", derive="edges"),
        "far": open_dense(images_, "depth", derive="distance"),
    }
    model = dense_model("swin", zoo.adapter("polyhistor-lite", tasks=names, **{**SMALL, "rank": 2}), outputs=0)
    before = {k: v.clone() for k, v in model.adapters["polyhistor-lite"].state_dict().items()}
    report = zoo.run(model, "multitask", data, data, epochs=2, tau=0.0, fit={"progress": False, "batch_size": 3})
    assert set(report.summary["values"]) == set(names)
    after = model.adapters["polyhistor-lite"].state_dict()
    assert all(not torch.equal(after[k], v) for k, v in before.items())
    batch = dense_images("swin")
    with torch.no_grad():
        logits = model(batch, context={"task": "edges"})
        one = single_task(model, "edges")
        assert [a.method for a in one.adapters.values()] == ["adapter"] and one.classes == ["edge"]
        torch.testing.assert_close(one(batch), logits[:, 2:3], rtol=1e-4, atol=1e-5)
        one.save_adapter(tmp_path / "edges")
        again = zoo.load(adapter=tmp_path / "edges", pretrained=False, seed=0)
        assert torch.equal(again(batch), one(batch))
