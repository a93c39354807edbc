"""Methods made as large as a budget of trainable parameters, the head not counted.

    found = sized("vit-micro", parse_methods("all"), budget=50_000, num_classes=10)
    found.chosen          # [Sized("lora", {"rank": 10}, 46_080), ...]
    found.left_out        # {"full": "it trains 2,691,648 parameters, more than the budget of 50,000, and has no size to set"}

Counted on the meta device, without weights. A method says with `Adapter.of_size(n)` how it becomes larger; the largest that fits
is taken. One that takes a budget itself (`budget`, in millions) is given it. One without a size is compared as it is, if it fits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from zoo import registry
from zoo.errors import ConfigError, ZooError
from zoo.loading import load

__all__ = ["Method", "Plan", "Sized", "parse_budget", "parse_methods", "sized", "trained"]

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000}
MOST = 1 << 13  # sizes beyond are not tried
NEAR = 8  # sizes below one that the method refuses (a divisor that does not fit, say) that are tried instead


@dataclass(frozen=True)
class Method:
    """A method with some of its settings; its label is what it was written as.

    Raises:
        ConfigError: a setting that it does not have, or a value that it refuses at any size.
    """

    label: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.settings:
            return
        try:
            registry.adapter(self.name, **self.settings)
        except ConfigError as error:
            more = registry.adapter_class(self.name).of_size(1)  # it may need a size beside them
            try:
                registry.adapter(self.name, **{**(more or {}), **self.settings})
            except ConfigError:
                raise ConfigError(f"'{self.label}': {error}") from error


@dataclass(frozen=True)
class Sized:
    """A method with all settings that were decided, and what it trains besides a head; `note` says what is not as usual."""

    label: str
    name: str
    settings: dict[str, Any]
    parameters: int
    note: str = ""


@dataclass
class Plan:
    """Which methods meet a budget, and why others do not."""

    chosen: list[Sized] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def parse_budget(text: str) -> int:
    """50000 of "0.05M", "50k" or "50000".

    Raises:
        ConfigError: it is no number of parameters.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kKmM]?)\s*", text)
    value = round(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if value < 1:
        raise ConfigError(f"The budget is '{text}'; expected a number of parameters: 0.05M, 50k or 50000.")
    return value


def parse_methods(text: str) -> list[Method]:
    """Methods of "lora,spt:form=adapter" (settings behind a colon, several with semicolons); "all" is every registered one.

    Raises:
        ConfigError: no method, one twice, a setting twice, without a value or wrong. UnknownNameError: no such method.
    """
    found: list[Method] = []
    for word in (w.strip() for w in text.split(",") if w.strip()):
        if word == "all":
            found += [Method(name, name) for name in registry.list_adapters() if name not in {m.label for m in found}]
            continue
        name, _, rest = word.partition(":")
        registry.adapter_class(name)
        settings: dict[str, Any] = {}
        for part in (p for p in rest.split(";") if p):
            key, equals, raw = part.partition("=")
            if not equals:
                raise ConfigError(
                    f"'{part}' of '{word}' is no setting; write name=value, for example spt:form=adapter."
                )
            if key in settings:
                raise ConfigError(f"'{word}' gives {key} twice.")
            try:
                settings[key] = json.loads(raw)
            except json.JSONDecodeError:
                settings[key] = raw
        found.append(Method(word, name, settings))
    if not found:
        raise ConfigError("No method is named; write them with commas, lora,vpt for example, or all.")
    if twice := sorted({m.label for m in found if [n.label for n in found].count(m.label) > 1}):
        raise ConfigError(f"'{twice[0]}' is named twice.")
    return found


def sized(backbone: str, methods: Sequence[Method], budget: int, num_classes: int, **options: Any) -> Plan:
    """Every method as large as the budget allows.

    Args:
        options: of `zoo.load`, such as `img_size`.

    Raises:
        ConfigError: the budget is below the cheapest unit of all of them, or above the whole backbone.
    """
    whole = load(backbone, num_classes=num_classes, pretrained=False, device="meta", **options)
    size = whole.num_parameters(head=False)
    if budget > size:
        raise ConfigError(
            f"The budget of {budget:,} parameters is above the whole of {backbone}, which has {size:,}. Name a smaller one; full "
            "fine-tuning is the method 'full'."
        )
    plan, least = Plan(), dict[str, int]()

    def count(method: Method, settings: dict[str, Any]) -> int:
        return trained(_model(backbone, method, settings, num_classes, options))

    for method in methods:
        try:
            found = _solve(method, budget, lambda settings, m=method: count(m, settings))  # type: ignore[misc]
        except ZooError as error:
            plan.left_out[method.label] = str(error)
            continue
        if found.parameters <= budget:
            plan.chosen.append(found)
            continue
        least[method.label] = found.parameters
        what = f"its smallest, {_words(found.settings)}," if found.settings != method.settings else "it"
        end = "" if found.settings != method.settings else ", and it has no size to set"
        plan.left_out[method.label] = (
            f"{what} trains {found.parameters:,} parameters, more than the budget of {budget:,}{end}."
        )
    if least and not any(c.parameters for c in plan.chosen):
        cheapest = min(least, key=least.__getitem__)
        raise ConfigError(
            f"The budget of {budget:,} parameters is below the cheapest unit of these methods: '{cheapest}' trains "
            f"{least[cheapest]:,} at least."
        )
    return plan


def own_size(backbone: str, methods: Sequence[Method], num_classes: int, **options: Any) -> list[Sized]:
    """Every method as its settings make it."""
    found = []
    for method in methods:
        model = _model(backbone, method, method.settings, num_classes, options)
        found.append(Sized(method.label, method.name, dict(method.settings), trained(model), "at its own size"))
    return found


def trained(model: Any) -> int:
    """How many parameters a model trains, the head not counted; of what grows, how many at the end."""
    return int(model.num_parameters(trainable=True, head=False)) + sum(a.to_come() for a in model.adapters.values())


def _model(backbone: str, method: Method, settings: dict[str, Any], classes: int, options: dict[str, Any]) -> Any:
    adapter = registry.adapter(method.name, **settings)
    return load(backbone, adapter=adapter, num_classes=classes, pretrained=False, device="meta", **options)


def _solve(method: Method, budget: int, count: Callable[[dict[str, Any]], int]) -> Sized:
    """The method at the largest of its sizes that fits, or at its smallest if none does."""
    cls = registry.adapter_class(method.name)
    takes = {f.name: f.default for f in fields(cls)}
    if isinstance(takes.get("budget"), float) and "budget" not in method.settings:
        settings = {**method.settings, "budget": budget / 1e6}
        registry.adapter(method.name, **settings)  # it may refuse it
        found = count(settings)
        decided = "" if found else "what it trains is decided on the data"
        return Sized(method.label, method.name, settings, found or budget, decided)
    first = cls.of_size(1)
    if first is None or set(first) & set(method.settings):
        note = "has no size to set" if first is None else "its size is given"
        return Sized(method.label, method.name, dict(method.settings), count(method.settings), note)
    known: dict[int, int | ZooError] = {}

    def fits(size: int) -> bool | None:
        """None: the method refuses this size."""
        if size not in known:
            try:
                more = cls.of_size(size)
                if more is None:
                    raise ConfigError(f"'{method.name}' has no larger size.")
                known[size] = count({**method.settings, **more})
            except ZooError as error:
                known[size] = error
        found = known[size]
        return None if isinstance(found, ZooError) else found <= budget

    low, bound, refused = 0, 1, 0
    while bound <= MOST and refused < 3 and (fit := fits(bound)) is not False:  # 1, 2, 4, 8 ... until one is too large
        low, refused = (bound, 0) if fit else (low, refused + 1)
        bound *= 2
    while bound - low > 1:  # by halves; where a size is refused, the next below that is not
        middle = (low + bound) // 2
        tried = next((n for n in range(middle, max(low, middle - NEAR), -1) if fits(n) is not None), None)
        if tried is None or fits(tried):
            low = middle
        else:
            bound = tried
    counts = {n: c for n, c in known.items() if isinstance(c, int)}
    if not counts:
        raise next(error for error in known.values() if isinstance(error, ZooError))
    best = max((n for n, c in counts.items() if c <= budget), default=min(counts))
    return Sized(method.label, method.name, {**method.settings, **(cls.of_size(best) or {})}, counts[best])


def _words(settings: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in settings.items())
