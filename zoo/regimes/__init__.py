"""Regimes: training procedures over fits, as generators of phases."""

from zoo.regimes.base import Phase, Regime
from zoo.regimes.report import RunReport
from zoo.regimes.running import run
from zoo.regimes.work import Run

__all__ = ["Phase", "Regime", "Run", "RunReport", "run"]
