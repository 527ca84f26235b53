"""`verl`: a reward function written for verl, `compute_score(data_source, solution_str, ground_truth, extra_info)`."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from polyphony.rewards.answers import completion_text
from polyphony.rewards.registry import OFFERED, settled

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verl:
    """Call verl's function as it is, once a completion: it returns a number, a dict with `score`, or `(score, ..)`.

    The ground truth is the row's `ground_truth`, `reward_model["ground_truth"]` or `answer`, whichever is not null.
    None where a row has none, where the function raises or returns no finite number: the grader does not know.
    """

    version: ClassVar[int] = 2

    function: str
    """`pkg.module:compute_score` or `path/to/file.py:compute_score`."""

    def __post_init__(self) -> None:
        _load(self.function)

    def __call__(
        self, prompts: list, completions: list, completion_ids: Any = None, **columns: Any
    ) -> list[float | None]:
        truths = _ground_truths(columns, len(completions))
        none = [None] * len(completions)
        rows = zip(columns.get("data_source", none), completions, truths, columns.get("extra_info", none), strict=True)
        results = settled([self._call(source, completion_text(c), truth, extra) for source, c, truth, extra in rows])
        return [_number(result) for result in results]

    async def _call(self, data_source: Any, solution: str, truth: Any, extra_info: Any) -> Any:
        if truth is None:
            logger.warning("verl: no ground truth for %.80r", solution)
            return None
        try:
            result = _load(self.function)(
                data_source=data_source, solution_str=solution, ground_truth=truth, extra_info=extra_info
            )
            return await result if inspect.isawaitable(result) else result
        except Exception:  # somebody else's grader may fail in any way; the row has no reward then
            logger.warning("verl: %s failed on %.80r", self.function, solution, exc_info=True)
            return None


def _called(found: Any) -> Callable[..., Any]:
    if not callable(found):
        raise ValueError(f"a {type(found).__name__} cannot be called")
    return found


@functools.cache
def _load(function: str) -> Callable[..., Any]:
    place, _, name = function.rpartition(":")
    try:
        if not place.endswith(".py"):
            return _called(pkgutil.resolve_name(function))
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return _called(getattr(module, name))
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise ValueError(f"verl: {function!r} is no function to be found: {error}") from error


def _ground_truths(columns: dict[str, Any], rows: int) -> list[Any]:
    known = {name: columns[name] for name in ("ground_truth", "reward_model", "answer") if name in columns}
    if not known:
        names = ", ".join(sorted(set(columns) - set(OFFERED)))
        raise ValueError(f"verl: rows need ground_truth, reward_model or answer; they have {names}")
    if "reward_model" in known:
        known["reward_model"] = [_truth_of_model(model) for model in known["reward_model"]]
    return [next((v[row] for v in known.values() if not _is_null(v[row])), None) for row in range(rows)]


def _truth_of_model(model: Any) -> Any:
    """Return the truth of verl's `{"style": "rule", "ground_truth": ..}`, or of its JSON; None where it holds none."""
    try:
        model = json.loads(model) if isinstance(model, str) else model
    except json.JSONDecodeError:
        return None
    return model.get("ground_truth") if isinstance(model, dict) else None


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(result: Any) -> float | None:
    """Return the score as verl reads it: of a dict its `score`, of a sequence the first element."""
    if isinstance(result, tuple | list):
        result = result[0] if result else None
    score: Any = result.get("score") if isinstance(result, dict) else result
    try:
        number = float(score)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
