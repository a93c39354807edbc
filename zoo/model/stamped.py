"""Which weights a model stands on, as it stands now: the part of a model that a saved adapter is checked against."""

from __future__ import annotations

from typing import Any

from zoo.backbone import WRAPPED
from zoo.engine.sharded import reshard
from zoo.library import only_tensors
from zoo.model.contextual import Contextual
from zoo.model.fingerprint import Watched, fingerprint


class Stamped(Contextual):
    """Base of `Model`."""

    backbone_name: str
    quantised: str = ""  # in what the projections' weights are kept since it was loaded (`zoo.load(quantise=...)`)
    _weights: Watched

    @property
    def fingerprint(self) -> str | None:
        """Of the backbone's weights as they are now (`zoo.model.fingerprint`); None on the meta device."""
        stand_ins = {id(s.trained): s.frozen for swaps in self._swaps.values() for s in swaps}
        reshard(self)
        before, found = self._weights.own, self._weights.now(self.backbone, stand_ins)
        if before and not self._weights.own:
            self.family.pretrained = False  # they are the user's own from now on
        return found

    @fingerprint.setter
    def fingerprint(self, value: str | None) -> None:
        self._weights.text = value

    @property
    def fingerprint_at_any_resolution(self) -> str | None:
        """As `fingerprint`, without the tables of positions, which libraries resample for another resolution."""
        return self.fingerprints[1]

    @property
    def fingerprints(self) -> tuple[str | None, str | None]:
        """Both, of one look at the weights."""
        text = self.fingerprint
        return text, None if text is None else self._weights.rest(self.backbone, text)

    def fingerprint_as(self, options: dict[str, Any]) -> str | None:
        """The fingerprint that this backbone's pretrained weights have when it is built with other options; None: not known."""
        cls = type(self.family)
        family = self.family
        if not family.pretrained or family.own_weights is not None or self.backbone_name.startswith(WRAPPED):
            return None
        name = cls.aliases.get(self.backbone_name, self.backbone_name)
        plain = {k: v for k, v in options.items() if k not in cls.point_options}
        with only_tensors():
            family = cls(cls.build(name, pretrained=True, **plain), self.backbone_name)
        family.take_head()
        return fingerprint(family.module)
