"""Puzzle: which attentions and MLPs of a network can do with less, within a budget of time, parameters, operations or memory.

    library    of each attention and MLP: children with fewer heads (of language models fewer heads of keys and values),
               with fewer neurons, as one projection, and nothing; each trained for `local_steps` to do what the parent's
               block does (`zoo.puzzle.library`), from the heads and neurons that matter most (`zoo.puzzle.importance`)
    scores     s of each child: 1 - cos of the final hidden states of the parent and of the parent with this one child, over
               `scored` items; or KL of what they answer (`objective="scores"`)
    costs      measured times, parameters, operations, bytes (`zoo.puzzle.costs`)
    choice     one child of each sublayer: minimise sum s, so that sum c_k + rest_k <= budget_k (`zoo.puzzle.solver`)
    imitation  the chosen network as a whole learns to pass on and to answer what the parent does (`zoo.puzzle.imitate`)

The chosen network is a backbone of its own (`zoo.model.children`), in the folder of the run: `backbone/`, and its head, if the
parent has one, in `head/`. `zoo.load("run/backbone", "lora", num_classes=10)` adapts it like any other;
`zoo.load("run/backbone", "run/head")` is the whole network, as is `report.model`. The model that was given stays as it is.

Defaults: heads of a ViT {all, 3/4, 1/2, 1/4}, neurons {all, 3/4, 1/2, 1/4, 1/10}; 200 steps of AdamW at 1e-3 for each block;
256 scored items. Sublayers that are equal in all their numbers are measured once.
Source: Bercovich et al., "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs", 2024 (NVIDIA/Model-Optimizer,
`modelopt/torch/puzzletron`).
Deviations: attention and MLP of a block are chosen each for itself, with scores that add up, where theirs chooses pairs
that are scored as pairs; so a library is a sum and not a product. Replacements cover one block, none covers several. Their
local distillation is not in the repository and follows the paper; global distillation there is another program's. Fewer heads
of a ViT and Swin take queries along with keys and values, as these networks keep no cache.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor

from zoo.data.seeds import kept_generators, seed_everything
from zoo.disk import write_file
from zoo.errors import ConfigError, WeightsError
from zoo.families.children import Form
from zoo.model import Model
from zoo.model.children import baked, child_of, places, substitute
from zoo.model.stored import load_changed, save_backbone
from zoo.puzzle.costs import RESOURCES, costs_of, totals
from zoo.puzzle.imitate import Imitate, divergence
from zoo.puzzle.library import Batches, forms_of, orders, text_of, train_block
from zoo.puzzle.passes import distance, replaced, seen
from zoo.puzzle.pictures import draw, table
from zoo.puzzle.solver import SOLVERS, Option, solve
from zoo.regimes.base import Phase, Regime
from zoo.regimes.report import RunReport
from zoo.regimes.work import Run
from zoo.registry import register_regime
from zoo.tasks.resolve import resolve
from zoo.train.evaluation import evaluate
from zoo.train.fitting import fit
from zoo.train.processes import Processes

__all__ = ["Puzzle"]

OBJECTIVES = ("features", "scores")
# Settings in which a run may differ from that whose library it takes
FREE = (*RESOURCES, "epochs", "lr", "solver", "library")
WHOLE = "The whole parent fits into the budget: nothing is to be replaced. Allow less."
Scores = dict[str, dict[str, float]]


@register_regime("puzzle")
@dataclass(eq=False)
class Puzzle(Regime):
    """Find a cheaper network of a model's own parts.

    `zoo.run(model, "puzzle", data, test, out="run/", runtime=0.6)`: a model without adapters, and one data set, whose labels
    are not read; `test` is measured at the end, if it is given.

    Args:
        runtime, parameters, operations, memory: the budget, each as a share of the parent's; None: no limit. One at least.
        heads, neurons: sizes of the children, as shares of the parent's. linear, nothing: whether there are those, too.
        local_steps, local_lr: of each block's children; 0 steps leave them as they are made. objective: "features" or
        "scores": what a child's score is measured on. scored: items that it is measured on. calibration: batches from which
        the heads and neurons that matter are known. epochs, lr: of the imitation; 0 epochs leave the chosen children as they
        are. batch_size: of all of them, and of what is measured. repeats: of the measurements of time. cache_tokens,
        cache_texts: of language models, how many words of how many texts the cache is to hold: part of the memory. solver:
        "pulp", "knapsack", or "auto".
    """

    runtime: float | None = None
    parameters: float | None = None
    operations: float | None = None
    memory: float | None = None
    heads: tuple[float, ...] = (0.75, 0.5, 0.25)
    neurons: tuple[float, ...] = (0.75, 0.5, 0.25, 0.1)
    linear: bool = True
    nothing: bool = True
    local_steps: int = 200
    local_lr: float = 1e-3
    objective: str = "features"
    scored: int = 256
    calibration: int = 8
    epochs: int = 5
    lr: float = 1e-4
    batch_size: int = 32
    repeats: int = 20
    cache_tokens: int = 0
    cache_texts: int = 1
    solver: str = "auto"
    library: str | None = None

    paper = "Bercovich et al. 2024"
    needs_head = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads, self.neurons = tuple(self.heads), tuple(self.neurons)
        given = [name for name in RESOURCES if getattr(self, name) is not None]
        self.check(
            bool(given), f"there is no budget: give {', '.join(RESOURCES)} as a share of the parent's, runtime=0.6."
        )
        for name in given:
            self.check(
                0 < getattr(self, name) <= 1, f"{name} is {getattr(self, name)}; expected a share, 0 < {name} <= 1."
            )
        for name in ("heads", "neurons"):
            shares = getattr(self, name)
            self.check(all(0 < share < 1 for share in shares), f"{name} are {shares}; expected shares between 0 and 1.")
        for name in ("scored", "calibration", "batch_size", "repeats", "cache_texts"):
            self.check(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; expected 1 or more.")
        for name in ("local_steps", "epochs", "cache_tokens"):
            self.check(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; expected 0 or more.")
        for name in ("lr", "local_lr"):
            self.check(getattr(self, name) > 0, f"{name} is {getattr(self, name)}; expected more than 0.")
        self.check(
            self.objective in OBJECTIVES, f"objective is '{self.objective}'; expected {' or '.join(OBJECTIVES)}."
        )
        self.check(self.solver in SOLVERS, f"solver is '{self.solver}'; expected one of {', '.join(SOLVERS)}.")
        more = bool(self.heads or self.neurons or self.linear or self.nothing)
        self.check(more, "there are no children: give heads, neurons, linear or nothing.")

    def prepare(self, run: Run) -> None:
        """A folder, one data set, a model without adapters whose family has children, one process."""
        if run.ledger.folder is None:
            raise ConfigError("puzzle makes a network, which goes into a folder: give out=.")
        self.check_data(run)
        if run.test is not None:  # it is measured at the very end
            task = resolve(run.model)
            task.check(run.model, task.open(run.model, run.test, train=False), "test data")
        if len(run.model.adapters):
            raise ConfigError(
                f"puzzle changes the backbone, and the model has adapters ({', '.join(run.model.adapters)}), which belong to "
                "it as it is. Merge or remove them first, and adapt the network that comes out."
            )
        if Processes(run.fit.get("device"), run.model).world > 1:
            raise ConfigError("puzzle trains blocks by hand, in one process. Start it without accelerate launch.")
        if self.objective == "scores" and run.model.family.pools and not run.model.num_classes:
            raise ConfigError("objective='scores' needs a head: load the model with one, or leave it out.")
        forms = self._forms(run.model)
        if not any(len(choices) > 1 for choices in forms.values()):
            raise ConfigError("puzzle: no sublayer of this network can have one of these children. Give others.")
        unit = type(run.model.family).children().unit
        if self.cache_tokens and "keys" not in unit["attn"]:
            raise ConfigError(f"cache_tokens is for language models; '{run.model.backbone_name}' keeps no cache.")

    def _forms(self, model: Model) -> dict[str, list[Form]]:
        return forms_of(model, self.heads, self.neurons, self.linear, self.nothing)

    # -- the run ----------------------------------------------------------------------------------------------------

    def phases(self, run: Run) -> Iterator[Phase]:
        """No phase trains the given model: all that happens is in the folder."""
        model = run.model
        model.to(Processes(run.fit.get("device"), model).device).eval()
        task = resolve(model)
        if self.library is not None:
            self._reuse(run, Path(self.library))
        common = {"device": model.device, "workers": run.fit.get("workers")}
        imitation = Imitate(model, task)  # which reads no labels
        batches = Batches(model, run.data, imitation, self.batch_size, self.seed, **common)  # type: ignore[arg-type]
        forms, example = self._forms(model), batches.first(1)[0]
        costs = run.once("costs", lambda: costs_of(model, forms, example, self.repeats, *self._cache))
        whole = run.once("parent", lambda: totals(model, example, self.repeats, *self._cache))
        budget = self._budget(costs, whole)
        # whether anything fits into the budget is known before hours are spent on children
        self._choose({name: dict.fromkeys(row, 0.0) for name, row in costs.items()}, costs, budget)
        order = run.once("orders", lambda: self._orders(run, batches, forms))
        for block in dict.fromkeys(name.rpartition(".")[0] for name in forms):
            run.once(f"library {block}", partial(self._train, run, block, forms, order, batches))
        scores = run.once("scores", lambda: self._scores(run, forms, order, batches))
        chosen = run.once("choice", lambda: self._choose(scores, costs, budget))
        run.once("imitation", lambda: self._imitate(run, chosen, forms, order, imitation))
        run.ledger._empty(self._folder(run) / "imitation")  # its checkpoints
        run.once("network", lambda: totals(self.network(run), example, self.repeats, *self._cache))
        if run.test is not None:
            run.evaluate(run.test, "parent on test")
            run.once("network on test", lambda: self._measured(run))
        run.model = self.network(run)
        yield from ()

    @property
    def _cache(self) -> tuple[int, int]:
        return self.cache_tokens, self.cache_texts

    def _reuse(self, run: Run, folder: Path) -> None:
        """Take what another run found out.

        Raises:
            ConfigError: it is no such run, is not through, or differs in more than budget and imitation.
        """
        try:
            former = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            there, values, settings = former["identity"], former["values"], former["identity"]["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"library='{folder}' is no folder of a run of puzzle ({error}).") from error
        own = json.loads(json.dumps(run.ledger.identity))
        odd = [k for k in ("regime", "model", "data") if there.get(k) != own[k]]
        odd += [k for k in own["settings"] if k not in FREE and settings.get(k) != own["settings"][k]]
        if odd:
            raise ConfigError(
                f"library='{folder}' is of another run: its {', '.join(odd)} differ. Make a library of your own."
            )
        if "scores" not in values:
            raise ConfigError(f"library='{folder}': that run has not come to its scores. Let it go on first.")
        for name, value in values.items():
            if name in ("costs", "parent", "orders", "scores") or name.startswith("library "):
                run.values.setdefault(name, value)
        for file in sorted((folder / "library").glob("*.safetensors")):
            write_file(self._file(run, file.stem), file.read_bytes())

    def _budget(self, costs: Any, whole: Mapping[str, float]) -> dict[str, float]:
        """What the sublayers may cost together: the share of the whole, less what stands in no sublayer."""
        found = {}
        for name in RESOURCES:
            share = getattr(self, name)
            if share is None:
                continue
            rest = max(0.0, whole[name] - sum(next(iter(row.values()))[name] for row in costs.values()))
            if share * whole[name] < rest:
                raise ConfigError(
                    f"No network fits into the budget: {name}={share} of the parent's {whole[name]:,.6g} is "
                    f"{share * whole[name]:,.6g}, and what stands in no sublayer costs {rest:,.6g} already. "
                    f"Expected more than {rest / whole[name]:.3f}."
                )
            found[name] = share * whole[name] - rest
        if all(sum(next(iter(row.values()))[n] for row in costs.values()) <= most for n, most in found.items()):
            raise ConfigError(WHOLE)
        return found

    def _choose(self, scores: Scores, costs: Any, budget: Mapping[str, float]) -> dict[str, str]:
        groups = [[Option(scores[name][form], row[form]) for form in row] for name, row in costs.items()]
        found = solve(groups, budget, solver=self.solver)
        return {name: list(row)[i] for (name, row), i in zip(costs.items(), found, strict=True)}

    def _orders(self, run: Run, batches: Batches, forms: Mapping[str, Sequence[Form]]) -> dict[str, list[int]]:
        return orders(run.model, list(forms), batches.first(self.calibration * self.batch_size))

    def _train(self, run: Run, block: str, forms: Any, order: Any, batches: Batches) -> dict[str, Any]:
        with kept_generators():
            seed_everything(self.seed, "puzzle", block)
            tensors, losses = train_block(
                run.model, block, forms, order, batches, steps=self.local_steps, lr=self.local_lr
            )
        write_file(self._file(run, block), dump_safetensors(tensors))
        return losses

    def _folder(self, run: Run) -> Path:
        assert run.ledger.folder is not None  # `prepare` has seen to it
        return run.ledger.folder

    def _file(self, run: Run, block: str) -> Path:
        return self._folder(run) / "library" / f"{block}.safetensors"

    def weights(self, run: Run, name: str, form: Form) -> dict[str, Tensor]:
        """The tensors of a trained child.

        Raises:
            WeightsError: the library lacks it.
        """
        block, _, role = name.rpartition(".")
        file, start = self._file(run, block), f"{role}/{text_of(form)}/"
        try:
            held = parse_safetensors(file.read_bytes())
        except Exception as error:  # safetensors has no error of its own for every damage
            raise WeightsError(f"'{file}' could not be read ({error}). Begin anew with resume=False.") from error
        return {key.removeprefix(start): value for key, value in held.items() if key.startswith(start)}

    @torch.no_grad()
    def _scores(self, run: Run, forms: Any, order: Any, batches: Batches) -> Scores:
        """What is lost by each child alone, a mean over items; the parent's own lose nothing."""
        model, known = run.model, places(run.model)
        inputs = batches.first(self.scored)
        parent = [seen(model, x) for x in inputs]
        found: Scores = {}
        for name, choices in forms.items():
            found[name] = {text_of(choices[0]): 0.0}
            for form in choices[1:]:
                child = child_of(model, name, form, order.get(name), self.weights(run, name, form))
                with replaced(known[name][0].module, child):
                    lost = torch.cat([self._lost(seen(model, x), p) for x, p in zip(inputs, parent, strict=True)])
                found[name][text_of(form)] = float(lost.mean())
        return found

    def _lost(self, child: Any, parent: Any) -> Tensor:
        if self.objective == "scores":
            return divergence(child.scores, parent.scores)
        return distance(child.final, parent.final)

    def _imitate(self, run: Run, chosen: Mapping[str, str], forms: Any, order: Any, task: Any) -> dict[str, Any]:
        """Make the network, train it as a whole, and write it."""
        folder = self._folder(run)
        children = {name: _form(forms[name], text) for name, text in chosen.items() if text != text_of(forms[name][0])}
        if not children:
            raise ConfigError(WHOLE)
        weights = {name: self.weights(run, name, form) for name, form in children.items()}
        network = substitute(run.model, children, order=order, weights=weights)
        entry: dict[str, Any] = {"history": [], "steps": 0, "seconds": 0.0}
        if self.epochs:
            network.add_adapter("full")
            report = fit(
                network,
                run.data,
                task=task,
                checkpoint=folder / "imitation",
                **{"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size, "seed": self.seed, **run.fit},
            )
            entry = {"history": report.history, "steps": report.steps, "seconds": report.seconds}
            network = baked(network)
        save_backbone(network, folder / "backbone")
        if network.num_classes:
            network.save_adapter(folder / "head")
        return entry

    def network(self, run: Run) -> Model:
        """The chosen network, with its head."""
        folder = self._folder(run)
        model = load_changed(folder / "backbone", device=run.model.device)
        if run.model.num_classes:
            from zoo.disk import attach, read

            attach(model, read(folder / "head"))
        return model.eval()

    def _measured(self, run: Run) -> dict[str, Any]:
        known = ("batch_size", "precision", "workers", "device", "progress")
        given = {k: v for k, v in run.fit.items() if k in known}
        return evaluate(self.network(run), run.test, **{"record": "", **given})

    # -- what was found ---------------------------------------------------------------------------------------------

    def summary(self, run: Run) -> dict[str, Any]:
        """The choice; what the network costs and what the parent costs, as a share, measured and as it was added up."""
        values = run.values
        chosen, costs, whole, now = values["choice"], values["costs"], values["parent"], values["network"]
        added = {}
        for name in RESOURCES:
            saved = sum(next(iter(row.values()))[name] - row[chosen[place]][name] for place, row in costs.items())
            added[name] = (whole[name] - saved) / whole[name] if whole[name] else 1.0
        summary: dict[str, Any] = {
            "chosen": chosen,
            "score": sum(values["scores"][name][form] for name, form in chosen.items()),
            **{name: now[name] / whole[name] if whole[name] else 1.0 for name in RESOURCES},
            "added_up": added,
            "speed": whole["runtime"] / now["runtime"],
        }
        for who, entry in (("parent", "parent on test"), ("network", "network on test")):
            numbers = values.get(entry, {})
            summary |= {f"{who}_{k}": v for k, v in numbers.items() if isinstance(v, float) and k != "seconds"}
        return summary

    def table(self, report: RunReport) -> tuple[list[str], list[list[Any]]]:
        """What was chosen in each block."""
        return table(report.summary["chosen"], report.values["scores"])

    def draw(self, figure: Any, report: RunReport) -> None:
        """What each child loses, and which were chosen."""
        draw(figure, report.summary["chosen"], report.values["scores"])


def _form(forms: Sequence[Form], text: str) -> Form:
    return next(form for form in forms if text_of(form) == text)
