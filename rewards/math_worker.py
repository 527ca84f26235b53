"""Whether two mathematical answers are equal, by math-verify. Runs in a worker process: it may never come back.

Two of math-verify's ways are left out. Its reader drops a last letter as a unit and makes `i` a symbol or the imaginary
unit by what stands beside it: here a letter is a letter and `i` the imaginary unit wherever nothing binds it. It compares
numbers by rounding: here decimals are exact, and only what has no end as a decimal may be given to six places.
"""

from __future__ import annotations

import contextlib
import logging
import re
from typing import Any

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import grader, verify
from math_verify.parser import get_last_eq
from sympy import Basic, Expr, Float, I, Integer, Interval, MatrixBase, Pow, Rational, Symbol, Tuple
from sympy.concrete.expr_with_limits import ExprWithLimits
from sympy.core.relational import Relational
from sympy.physics import units
from sympy.physics.units import Quantity

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its timeouts are off: the worker's own limit is harder
_CONFIG = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)

_ROUNDED = 5e-7
"""Half a unit in the sixth place."""

_IMAGINARY = Symbol("i", real=True)

_POINTS = [Rational(n, 7) for n in (5, -11, 23, -3, 16, 31, -19, 9, -26, 2, -38, 47, 13)]
"""Where two functions are compared."""


def equivalent(job: dict[str, str]) -> bool | None:
    """Return whether `job["answer"]` equals `job["reference"]`; None where the reference can not be read.

    `answer_unit` and `reference_unit` come where both have one and they are written differently.
    """
    reference = _read(job["reference"])
    if reference is None:
        return None
    factor = _factor(job.get("answer_unit", ""), job.get("reference_unit", ""))
    answer = _read(job["answer"])
    if answer is None or factor is None:
        return False
    if factor != 1:
        answer = factor * answer
    return bool(
        verify(reference, answer, timeout_seconds=None, allow_set_relation_comp=True)
        or _is_same_function(reference, answer)
    )


def _read(expression: str) -> Any:
    """Return the expression with exact numbers; None where the grammar does not know it."""
    text = normalize_latex(expression, config=_CONFIG)
    for part in dict.fromkeys([text, get_last_eq(text)]):
        with contextlib.suppress(Exception):  # the parser raises whatever it meets
            return _exact(latex2sympy(part, is_real=True, convert_degrees=False, normalization_config=None))
    return None


def _exact(part: Any) -> Any:
    """Return the expression with rationals for decimals and the imaginary unit for a free `i`."""
    if isinstance(part, MatrixBase):
        return part.applyfunc(_exact)
    if isinstance(part, Float):
        return Rational(str(part))
    if part == _IMAGINARY:
        return I
    if not isinstance(part, Basic) or (isinstance(part, ExprWithLimits) and _IMAGINARY in part.bound_symbols):
        return part
    old = getattr(part, "_unsorted_args", part.args)  # a list keeps the order it was written in
    new = [_exact(argument) for argument in old]
    if all(a is b for a, b in zip(old, new, strict=True)):
        return part
    if isinstance(part, Relational):
        return part.func(*new, evaluate=False)
    if isinstance(part, Interval) and not (new[0].is_extended_real and new[1].is_extended_real):
        return Tuple(*new[:2])
    return part.func(*new)


def _numbers_equal(a: Any, b: Any, _rounding: int, _precision: int) -> bool:
    """Stand in for math-verify's comparison of numbers, which knows six places and calls 1e-7 and 2e-7 equal."""
    if isinstance(a, MatrixBase) and isinstance(b, MatrixBase):
        return a.shape == b.shape and all(
            grader.sympy_expr_eq(x, y, _rounding, _precision) for x, y in zip(a.flat(), b.flat(), strict=True)
        )
    if not (isinstance(a, Expr) and isinstance(b, Expr)) or a.free_symbols or b.free_symbols:
        return False
    if (grader.get_pct_val(a) is None) != (grader.get_pct_val(b) is None):
        bare = grader.get_pct_val(a, a), grader.get_pct_val(b, b)
        if all(isinstance(number, Integer) for number in bare) and bare[0] == bare[1]:
            return True  # 50 % may be asked for as 50
    a, b = a.doit(), b.doit()
    if _is_zero(a - b):
        return True
    decimal = [_is_decimal(number) for number in (a, b)]
    if decimal[0] == decimal[1]:
        return False
    given, exact = (a, abs(b.evalf())) if decimal[0] else (b, abs(a.evalf()))
    is_long = bool((given * 10**5).q > 1)
    return bool(is_long and exact.is_finite and abs((a - b).evalf()) <= _ROUNDED * min(1, 10 * exact))


grader.sympy_numeric_eq = _numbers_equal


def _is_decimal(number: Expr) -> bool:
    """Say whether a number ends as a decimal, so that nothing but itself stands for it."""
    if not isinstance(number, Rational):
        return False
    rest = number.q
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _is_zero(number: Expr) -> bool:
    if number.is_Rational:
        return number == 0
    # evalf works with more and more digits until one is certain; what is left after a hundred is zero
    parts = number.evalf(15).as_real_imag()
    return all(isinstance(part, (Float, Integer)) and (part == 0 or getattr(part, "_prec", 0) == 1) for part in parts)


def _is_same_function(a: Any, b: Any) -> bool:
    """Say whether two real functions with roots agree: real at the same points, and equal there.

    As complex functions 1/sqrt(n) and sqrt(1/n) differ for negative n, so simplifying never makes them one.
    """
    if not (isinstance(a, Expr) and isinstance(b, Expr) and a.free_symbols and a.free_symbols == b.free_symbols):
        return False
    if not any(power.exp.is_integer is not True for side in (a, b) for power in side.atoms(Pow)):
        return False
    symbols, agreed = sorted(a.free_symbols, key=str), 0
    for shift in range(len(_POINTS)):
        point = {s: _POINTS[(shift + 4 * place) % len(_POINTS)] for place, s in enumerate(symbols)}
        here: list[Any] = [side.xreplace(point).doit() for side in (a, b)]
        real = [_is_zero(value.as_real_imag()[1]) if value.is_finite else None for value in here]
        if real[0] != real[1] or (real[0] and not _is_zero(here[0] - here[1])):
            return False
        agreed += bool(real[0])
    return agreed >= 3


def _factor(ours: str, theirs: str) -> Expr | None:
    """Return how much of their unit our unit is; None where that is another quantity."""
    if ours == theirs or set(ours.split()) < set(theirs.split()) or set(theirs.split()) < set(ours.split()):
        return Integer(1)
    (a, power_a), (b, power_b) = _quantity(ours), _quantity(theirs)
    if a is None or b is None or power_a != power_b or a.dimension != b.dimension:
        return None
    return (a.scale_factor / b.scale_factor) ** power_a


def _quantity(unit: str) -> tuple[Quantity | None, int]:
    name, _, power = re.sub(r"^(?:sq|square) (\w+)$", r"\1^2", re.sub(r"^cubic (\w+)$", r"\1^3", unit)).partition("^")
    found = getattr(units, _SHORT.get(name, name), None)
    return found if isinstance(found, Quantity) else None, int(power or 1)


_SHORT = {"sec": "second", "secs": "second", "min": "minute", "mins": "minute", "hr": "hour", "hrs": "hour"} | {
    "h": "hour", "lb": "pound", "lbs": "pound", "in": "inch", "yd": "yard", "metre": "meter", "metres": "meter",
    "litre": "liter", "litres": "liter", "degrees": "degree", "°": "degree",
}  # fmt: skip
"""Names of units that sympy does not know by them."""


# the first reading compiles the grammar, the first algebra loads half of sympy: that is not any job's time
equivalent({"reference": "\\frac{x}{2} + x", "answer": "\\frac{3x}{2}"})
