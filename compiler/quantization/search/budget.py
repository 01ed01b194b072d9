"""The choice of formats: the least harm within a budget of bits, exactly, by SciPy's MILP solver (HiGHS)."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from n3c.compiler.quantization.units import Unit
from n3c.ir.diagnostics import Diagnostic, ExitCode, N3CError

from .noise import Scores

_GAP = 1e-9
"""Relative gap at which the solver stops: below the noise of any score."""


def choose(units: Sequence[Unit], scores: Scores, effective_bits: float) -> dict[str, str]:
    """Return the format of every unit: the choice of least total score whose mean is at most `effective_bits`.

        min Σ_u score(u, f_u)   subject to   Σ_u bits(f_u) weights(u) ≤ effective_bits Σ_u weights(u)

    A multiple-choice knapsack. More bits never count as harm: a score below that of a costlier format
    is raised to it. Raises N3CError (exit code 2) where even the cheapest formats need more bits,
    (exit code 1) for a score that is no number.
    """
    least = require_feasible(units, effective_bits)
    total = sum(unit.weights for unit in units)
    harm = [_monotone(unit, scores[unit.name]) for unit in units]
    limit = Fraction(effective_bits)
    slack = 0.0
    while True:  # the solver's tolerance is 1e-6 of the row: tightened where it was used
        chosen = _solve(units, harm, effective_bits - slack, total)
        if sum(Fraction(unit.bits(f)) for unit, f in zip(units, chosen, strict=True)) <= limit * total:
            return {unit.name: format_ for unit, format_ in zip(units, chosen, strict=True)}
        if slack > 1e-3 or least > effective_bits - slack - 2e-6:
            return {unit.name: unit.formats[0] for unit in units}
        slack += 2e-6


def require_feasible(units: Sequence[Unit], effective_bits: float) -> float:
    """Return the bits a weight of the cheapest choice; N3CError (exit code 2) where they are more than given."""
    total = sum(unit.weights for unit in units)
    least = sum(unit.bits(unit.formats[0]) for unit in units) / total if total else 0.0
    if not total or least > effective_bits:
        raise _infeasible(least, effective_bits, bool(total))
    return least


def mean_bits(units: Sequence[Unit], formats: dict[str, str]) -> float:
    """Return the bits a weight of a choice, over the weights that were chosen for."""
    return sum(unit.bits(formats[unit.name]) for unit in units) / sum(unit.weights for unit in units)


def _monotone(unit: Unit, scores: dict[str, float]) -> list[float]:
    """Return the scores in the order of the formats, none below that of a costlier one."""
    harm = [scores[format_] for format_ in unit.formats]
    for format_, score in zip(unit.formats, harm, strict=True):
        if not math.isfinite(score):
            message = f"the sensitivity of `{unit.name}` in {format_} is {score}"
            help_ = "the calibration gives activations or gradients that are not finite: try other tokens"
            raise N3CError(Diagnostic("E0409", message, help=help_), ExitCode.NUMERICS)
    for i in reversed(range(len(harm) - 1)):
        harm[i] = max(harm[i], harm[i + 1])
    return harm


def _solve(units: Sequence[Unit], harm: Sequence[Sequence[float]], bits: float, total: int) -> list[str]:
    import numpy as np

    scipy_optimize: Any = importlib.import_module("scipy.optimize")  # has no types
    scipy_sparse: Any = importlib.import_module("scipy.sparse")
    sizes = [len(unit.formats) for unit in units]
    owner = np.repeat(np.arange(len(units)), sizes)
    cost = np.array([unit.bits(format_) / total for unit in units for format_ in unit.formats])
    score = np.array([value for values in harm for value in values])
    score = score / (score.max(initial=0.0) or 1.0)
    one_each = scipy_sparse.csr_array(
        (np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(len(units), len(owner))
    )
    solution = scipy_optimize.milp(
        score,
        integrality=np.ones(len(owner)),
        bounds=scipy_optimize.Bounds(0, 1),
        constraints=[
            scipy_optimize.LinearConstraint(one_each, 1, 1),
            scipy_optimize.LinearConstraint(cost[None, :], -np.inf, bits),
        ],
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if solution.x is None:
        raise N3CError(Diagnostic("E0409", f"no choice of formats: {solution.message}"), ExitCode.NUMERICS)
    ends = np.cumsum([0, *sizes])
    picks = [int(np.argmax(solution.x[start:end])) for start, end in pairwise(ends)]
    return [unit.formats[pick] for unit, pick in zip(units, picks, strict=True)]


_SECONDS = 120.0
"""The solver stops then with the best choice found; hundreds of layers take well below a second."""


def _infeasible(least: float, wanted: float, any_units: bool) -> N3CError:
    if not any_units:
        message, help_ = "this model has no linear that --auto may quantize", None
    else:
        message = f"--effective-bits {wanted:g} is below {least:.4f}, the least that the formats of this model need"
        help_ = f"at least --effective-bits {math.ceil(least * 100) / 100:g}"
    return N3CError(Diagnostic("E0408", message, help=help_), ExitCode.USAGE)
