"""reasoning-gym's datasets, on a worker's side: questions by number, and scores.

Several scorers hand the model's answer to `eval` or to sympy's parser, which evaluates too. So an answer to such a
dataset must be a plain literal or a plain formula, and its scorer works in a process that can neither write nor
connect, and can be killed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
from typing import Any

from reasoning_gym.factory import DATASETS, create_dataset

_EVAL = re.compile(r"\b(?:eval|exec)\(")
_SYMPY = re.compile(r"\b(?:parse_expr|sympify|simplify)\(")
_NAME = re.compile(r"[A-Za-z_]\w*")
_CALL = re.compile(r"([A-Za-z_]\w*)\s*\(")
_NOT_IN_FORMULAS = re.compile(r"__|\b(?:lambda|or|and|not|if|else|in|is)\b|[\"'`\\\[\]{}:;=@#\n]|\.\s*[A-Za-z_]")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
_FUNCTIONS |= {"exp", "log", "ln", "sqrt", "Abs"}


NONSENSE = "surely wrong"


def questions(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `question` and `answer` of the items `job["indices"]`, and whether their scorer `accepts` any text."""
    dataset = _dataset(job["dataset"], job["seed"], job["size"], job["config"])
    entries = [dataset[index] for index in job["indices"]]
    return [
        {
            "question": entry["question"],
            "answer": "" if entry["answer"] is None else str(entry["answer"]),
            "accepts": _scored(dataset, NONSENSE, entry) >= 1.0,
        }
        for entry in entries
    ]


def score(job: dict[str, Any]) -> float:
    """Return what reasoning-gym gives `job["answer"]`, in [0, 1]; 0 for one that would do more than be read."""
    dataset = _dataset(job["dataset"], job["seed"], job["size"], job["config"])
    entry = dataset[job["index"]]
    answer = job["answer"].strip()
    if answer != entry["answer"] and not _is_harmless(answer, _scorer_source(job["dataset"])):
        return 0.0
    return _scored(dataset, answer, entry)


def work(job: dict[str, Any]) -> Any:
    """Do what a job asks: score the answer that it brings, or make the questions that it numbers."""
    return score(job) if "answer" in job else questions(job)


def _scored(dataset: Any, answer: str, entry: dict[str, Any]) -> float:
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:  # scorers choke on malformed answers in many ways; one that takes its own answer is sound
        dataset.score_answer(entry["answer"], entry)
        return 0.0


@functools.lru_cache(maxsize=64)
def _dataset(dataset: str, seed: int, size: int, config: str) -> Any:
    if dataset not in DATASETS:
        raise ValueError(f"reasoning-gym has no dataset {dataset!r}; it has {', '.join(sorted(DATASETS))}, composition")
    try:
        return create_dataset(dataset, seed=seed, size=size, **json.loads(config))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym's {dataset}: config {config}: {error}") from error


@functools.cache
def _scorer_source(dataset: str) -> str:
    return inspect.getsource(DATASETS[dataset][0].score_answer)


def _is_harmless(answer: str, scorer_source: str) -> bool:
    """Say whether the scorer may see the answer: it evaluates nothing, or there is nothing to evaluate."""
    evaluates, parses = _EVAL.search(scorer_source), _SYMPY.search(scorer_source)
    if not evaluates and not parses:
        return True
    try:
        ast.literal_eval(answer)
        return True
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        pass
    if _NOT_IN_FORMULAS.search(answer) or not set(_CALL.findall(answer)) <= _FUNCTIONS:
        return not _is_python(answer) and not parses
    return not evaluates or not _NAME.search(answer) or not _is_python(answer)


def _is_python(answer: str) -> bool:
    try:
        compile(answer, "answer", "eval", ast.PyCF_ONLY_AST)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
