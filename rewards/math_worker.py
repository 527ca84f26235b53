"""Whether two mathematical answers are equal, by math-verify. Runs in a worker process: it may never come back."""

from __future__ import annotations

import logging

from math_verify import parse, verify
from math_verify.parser import LatexExtractionConfig

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # its timeouts are off: the worker's own limit is harder
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]


def equivalent(job: dict[str, str]) -> bool | None:
    """Return whether `job["answer"]` equals `job["reference"]`; None where the reference can not be read."""
    reference = _read(job["reference"])
    if all(isinstance(reading, str) for reading in reference):
        return None
    return bool(verify(reference, _read(job["answer"]), timeout_seconds=None, allow_set_relation_comp=True))


def _read(expression: str) -> list:
    return parse(f"\\boxed{{{expression}}}", _CONFIG, parsing_timeout=0)


# the first reading compiles the grammar, the first algebra loads half of sympy: that is not any job's time
equivalent({"reference": "\\frac{x}{2} + x", "answer": "\\frac{3x}{2}"})
