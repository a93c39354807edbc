"""More sets of adapters than torch's compiler takes graphs by default: one graph for each, and none twice."""

from __future__ import annotations

import torch
import torch._dynamo
from method_models import bare, images, shake
from torch._dynamo.utils import counters

import zoo


def test_ten_sets_and_ten_routes() -> None:
    """The ninth set fell back to eager without a word, or failed with fullgraph=True."""
    model = bare("vit", depth=1).eval()
    names = [f"a{i}" for i in range(10)]
    for i, name in enumerate(names):
        model.add_adapter(zoo.adapter("lora", rank=1), name, activate=False)
        shake(model, name, i)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    try:
        with torch.no_grad():
            for _ in range(2):
                for name in names:
                    model.set_active(name)
                    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-4, atol=1e-5)
            assert counters["stats"]["unique_graphs"] == 10
            for i, name in enumerate(names):
                rows = [name, names[i - 1], None, name]
                found = compiled(images(), adapters=model.route(rows))
                torch.testing.assert_close(found, model(images(), adapters=rows), rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 20
    finally:
        torch._dynamo.reset()
