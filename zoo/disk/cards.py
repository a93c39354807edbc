"""Model cards: what a published adapter is, on which backbone, its data, its numbers, how to load it.

A section is there only if there is something to say, and only what was measured is said: numbers come from the model
and from `model.record`, which `zoo.fit` and `zoo.evaluate` fill. There is no placeholder.

| key of `model.record` | content |
| --- | --- |
| `task` | the Hub's name of the task, such as "image-classification" |
| `data` | `name`, `train`, `val`, `test` (images in each split); `hub_id`, `url`, `license` if it has them |
| `metrics` | name: number on the test split; or split: {name: number} |
| `hyperparameters` | name: value |
| `seconds`, `device` | how long the training took, and on what |
| `saved_bytes` | bytes kept for backward: a number, or memory setting: number |
| `license` | licence of the adapter's own weights |
| `notes` | sentences, one for each paragraph |
| `tables` | list of {"title", "columns", "rows"} |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zoo import registry
from zoo.disk.layout import CARD
from zoo.disk.markdown import Ready, code, line, link, plain, prose, python, table
from zoo.disk.record import check_record, is_number
from zoo.heads import Head

if TYPE_CHECKING:
    from zoo.adapters.base import Adapter
    from zoo.host import Host

_SPLITS = ("train", "val", "test")
_FRACTIONS = ("accuracy", "top1", "top5", "f1", "precision", "recall", "iou")
_LOAD_LINE = re.compile(r'^(model = zoo\.load\(.*?adapter=)"(?:[^"\\\n]|\\.)*"', re.MULTILINE)


def render(
    model: Host,
    adapters: Sequence[str] | None = None,
    *,
    source: str | None = None,
    fingerprint: str | None = None,
) -> str:
    """The card of a model's active (or named) adapters as text: the Hub's metadata, then the sections.

    `source` is the repository id or folder that readers load, `fingerprint` the model's where it was taken just now.
    """
    card = _Card(model, list(model.active if adapters is None else adapters), source)
    card.fingerprint = fingerprint or model.fingerprint
    parts = [f"---\n{card.metadata()}\n---", f"# {plain(card.title)}", card.summary()]
    for title, text in (
        ("How to load", card.loading()),
        ("Results", card.results()),
        ("Data", card.data()),
        ("Parameters", card.parameters()),
        ("Memory", card.memory()),
        ("Training", card.training()),
        ("Backbone", card.backbone()),
        ("Licence", card.licence()),
    ):
        if text:
            parts.append(f"## {title}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def write_card(model: Host, path: str | Path, *, source: str | None = None) -> Path:
    """Write the card to a file, or as README.md into a folder; returns the file. Raises `SaveError`."""
    from zoo.disk import write_file

    path = Path(path)
    target = path / CARD if path.is_dir() or not path.suffix else path
    write_file(target, render(model, source=source).encode())
    return target


def retarget(card: str, source: str) -> str:
    """The card with `source` in its loading line; the rest, which somebody may have edited, stays as it is."""
    return _LOAD_LINE.sub(lambda found: f"{found[1]}{python(source)}", card)


class _Card:
    """The texts of the sections; each is "" if there is nothing to say."""

    fingerprint: str | None = None

    def __init__(self, model: Host, names: list[str], source: str | None) -> None:
        self.model = model
        self.source = source
        self.names = names
        self.adapters = [cast("Adapter", model.adapters[name]) for name in names]
        self.methods = list(dict.fromkeys(adapter.method for adapter in self.adapters))
        self.record = model.record_of(names)
        check_record(self.record, "model.record")
        self.head = model.heads[model.head_for(names)]
        self.num_classes = int(getattr(self.head, "out_features", 0))
        self.data_record: Mapping[str, Any] = self.record.get("data") or {}
        self.metrics = _by_split(self.record.get("metrics") or {})
        own = model.family.own_weights
        self.base = model.family.hub_id() if own is None else own.source
        what = " + ".join(dict.fromkeys(type(adapter).__name__ for adapter in self.adapters)) or "Head"
        on = f" on {self.data_record['name']}" if self.data_record.get("name") else ""
        self.title = line(f"{what} for {model.backbone_name}{on}")

    def metadata(self) -> str:
        """The YAML that the Hub reads."""
        from huggingface_hub import EvalResult, ModelCardData

        name = re.sub(r"[^\w.]+", "-", self.title).strip("-").lower()
        licence = self.record.get("license")
        known = isinstance(licence, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence)
        dataset = self.data_record.get("hub_id")
        results = [
            EvalResult(
                task_type=self._task() or "other",
                dataset_type=dataset or re.sub(r"[^\w.]+", "-", self.data_record["name"]).strip("-").lower(),
                dataset_name=self.data_record["name"],
                dataset_split=split,
                metric_type=metric,
                metric_value=value,
            )
            for split, metrics in self.metrics.items()
            for metric, value in metrics.items()
            if self.data_record.get("name")
        ]
        data = ModelCardData(
            license=(licence if known else "other") if licence else None,
            license_name=None if known or not licence else str(licence),
            library_name="adapter-zoo",
            base_model=self.base,
            base_model_relation="adapter" if self.base else None,
            pipeline_tag=self._task(),
            tags=["adapter-zoo", "parameter-efficient-fine-tuning", *self.methods, self.model.family.family],
            datasets=[dataset] if dataset else None,
            metrics=sorted({metric for metrics in self.metrics.values() for metric in metrics}) or None,
            model_name=name if results else None,
            eval_results=results or None,
        )
        return data.to_yaml()

    def _task(self) -> str | None:
        if self.record.get("task"):
            return str(self.record["task"])
        if isinstance(self.head, Head) and self.head.of_maps:
            return None  # what the family says is of the pooled features
        return self.model.family.hub_task(self.num_classes)

    def summary(self) -> str:
        """One sentence: what this is."""
        method = "An adapter (" + ", ".join(self.methods) + ")" if self.methods else "A head"
        task = self._task()
        purpose = f" for {plain(task.replace('-', ' '))}" if task else ""
        text = f"{method}{purpose} on the frozen backbone {code(self.model.backbone_name)}, made with adapter-zoo."
        return "\n\n".join([text, *filter(None, map(prose, self.record.get("notes") or []))])

    def loading(self) -> str:
        """Python that loads and runs it, if it is known where from."""
        if not self.source:
            return ""
        own = self.head.usage(self.record.get("trained_for")) if isinstance(self.head, Head) else None
        imports, lines = own or self.model.family.usage(self.num_classes)
        # without it, the classifier that the checkpoint has would stand on the features
        bare = ", num_classes=0" if self.model.family.task == "classify" and not self.num_classes else ""
        name = self.model.backbone_name
        brought = f"{self.model.family.brought}, " if self.model.family.brought else ""
        # of somebody's, see `zoo.disk.trust`
        if not brought and not registry.known_backbone(name) and re.search(r"[:/\\]", name):
            bare += f", trust_backbone={python(name)}"
        written = [
            "import zoo",
            *imports,
            "",
            f"model = zoo.load({brought}adapter={python(self.source)}{bare})",
            *lines,
        ]
        return "\n".join(["```python", *written, "```"])

    def results(self) -> str:
        """Metrics of each split, then the tables of the record."""
        parts = []
        if self.metrics:
            rows = [[m, split, _number(m, v)] for split, metrics in self.metrics.items() for m, v in metrics.items()]
            parts.append(table(["metric", "split", "value"], rows))
        for one in self.record.get("tables") or []:
            title = f"### {plain(one['title'])}\n\n" if one.get("title") else ""
            parts.append(title + table(one["columns"], one["rows"]))
        return "\n\n".join(parts)

    def data(self) -> str:
        """Name, source and sizes of the splits."""
        record = self.data_record
        if not record.get("name"):
            return ""
        text = link(record["name"], record["url"]) if record.get("url") else plain(record["name"])
        if record.get("hub_id"):
            text += f" ({code(record['hub_id'])})"
        sizes = [f"{record[split]:,} {split}" for split in _SPLITS if isinstance(record.get(split), int)]
        if sizes:
            text += ": " + ", ".join(sizes)
        if record.get("license"):
            text += f". Licence of the data: {plain(record['license'])}"
        return text + "."

    def parameters(self) -> str:
        """Trained parameters, with and without the head, and their share of all."""
        own = sum(p.numel() for adapter in self.adapters for p in adapter.parameters())
        head = sum(p.numel() for p in self.head.parameters())
        # what is trained in the place of a parameter of the backbone is not counted with it once more
        replaced = sum(a.get_parameter(name).numel() for a in self.adapters for name in a.stand_ins)
        # not `.parameters()`, which also puts names together and takes several times as long
        held = {id(p): p for m in self.model.backbone.modules() for p in m._parameters.values() if p is not None}
        frozen = sum(p.numel() for p in held.values()) - replaced
        rows = [["adapter", f"{own:,}", f"{100 * own / (own + frozen):.2f} %"]]
        if head:
            total = own + head + frozen
            rows.append(["adapter and head", f"{own + head:,}", f"{100 * (own + head) / total:.2f} %"])
        rows.append(["frozen backbone", f"{frozen:,}", ""])
        return table(["", "parameters", "share of all"], rows)

    def memory(self) -> str:
        """Bytes kept for backward, if they were counted."""
        saved = self.record.get("saved_bytes")
        if not saved:
            return ""
        batch = (self.record.get("hyperparameters") or {}).get("batch_size")
        of = f" for a batch of {batch}" if batch else ""
        if not isinstance(saved, Mapping):
            return f"One training step keeps {_bytes(saved)} for backward{of}."
        rows = [[Ready(code(f'memory="{setting}"')), _bytes(size)] for setting, size in saved.items()]
        return f"What one training step keeps for backward{of}:\n\n" + table(["setting", "kept"], rows)

    def training(self) -> str:
        """Settings of the method and of the run, and how long it took."""
        parts = []
        settings = {f"{a.method}.{key}": value for a in self.adapters for key, value in a.config().items()}
        settings |= self.record.get("hyperparameters") or {}
        rows = [[key, value] for key, value in settings.items() if value is not None]
        if rows:
            parts.append(table(["setting", "value"], rows))
        if self.record.get("seconds"):
            on = f" on {plain(self.record['device'])}" if self.record.get("device") else ""
            parts.append(f"The training took {_duration(float(self.record['seconds']))}{on}.")
        return "\n\n".join(parts)

    def backbone(self) -> str:
        """Name, source, fingerprint and licence."""
        items = [f"name: {code(self.model.backbone_name)}"]
        if self.base:
            items.append(f"weights: {link(self.base, f'https://huggingface.co/{self.base}')}")
        if self.fingerprint:
            items.append(f"fingerprint of the weights: `{self.fingerprint}`")
        own = self.model.family.own_weights
        if own is not None:
            items.append(f"weights: `{own.file}`, its user's own")
        licence = self.model.family.licence() if own is None else own.licence
        if licence:
            items.append(f"licence: {plain(licence)}")
        return "\n".join(f"- {item}" for item in items)

    def licence(self) -> str:
        """Licence of the adapter."""
        return f"The adapter's weights: {plain(self.record['license'])}." if self.record.get("license") else ""


def _by_split(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """{"accuracy": 0.9} or {"test": {"accuracy": 0.9}} as {split: {metric: number}}, without what is no number."""
    nested = {split: values for split, values in metrics.items() if isinstance(values, Mapping)}
    flat = {name: value for name, value in metrics.items() if is_number(value)}
    found = {"test": flat} if flat else {}
    for split, values in nested.items():
        numbers = {name: value for name, value in values.items() if is_number(value)}
        if numbers:
            found[split] = found.get(split, {}) | numbers
    return found


def _number(name: str, value: float) -> str:
    if name.lower().startswith(_FRACTIONS) and 0 <= value <= 1:
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
