"""What TRL's tests need beside a checkout, as a plugin of pytest: rows and models of this machine, ours in TRL's place.

Loaded by its file's name in a process of its own, where `tests` is the checkout's package. Models of the hub are tiny random
ones of the same architecture, in a folder laid out as the hub's cache; rows are of the same columns. TRL is the installed
one: it is imported before the checkout is on the path.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl
from trl import import_utils
from trl.trainer.grpo_config import GRPOConfig

SIDE = os.environ["TRL_SUITE_SIDE"]
RESULTS = Path(os.environ["TRL_SUITE_RESULTS"])
APART = re.compile(r"rollout_func|zen-image|zen-multi-image|vllm_mode|image")
"""Tests of TRL's own inside, and of images."""

ZEN = """Beautiful is better than|Explicit is|Simple is better|Complex|Flat is better than|Sparse is better|Readability|
Special cases aren't special|Although practicality beats|Errors should never|Unless explicitly|
In the face of ambiguity, refuse|There should be one-- and preferably|Although that way may not be|Now is better than|
If the implementation is hard|If the implementation is easy|Namespaces are one|Although never is often"""
ROWS = [" ".join(row.split()) for row in ZEN.replace("\n", "").split("|")]
SPLITS = {"train": ROWS[:17], "test": ROWS[17:]}


def load_dataset(path: str, name: str, split: str | None = None, streaming: bool = False) -> Any:
    """Stand for that of `datasets`: the rows of `trl-internal-testing/zen`."""
    if path != "trl-internal-testing/zen":
        raise FileNotFoundError(f"{path} is not here")
    as_prompt = {
        "standard_prompt_only": lambda text: text,
        "conversational_prompt_only": lambda text: [{"role": "user", "content": f"How does it go on: {text}?"}],
    }[name]
    made: dict[str, Any] = {
        s: datasets.Dataset.from_list([{"prompt": as_prompt(t)} for t in rows]) for s, rows in SPLITS.items()
    }
    if streaming:
        made = {s: rows.to_iterable_dataset() for s, rows in made.items()}
    if split is not None:
        return made[split]
    return (datasets.IterableDatasetDict if streaming else datasets.DatasetDict)(**made)


def _is_available(name: str) -> Any:
    """Answer for what another version of TRL can tell and the installed one no longer can: is a package there?"""
    if found := re.fullmatch(r"is_(\w+)_available", name):
        return lambda *version: importlib.util.find_spec(found[1]) is not None
    raise AttributeError(name)


import_utils.__getattr__ = _is_available  # type: ignore[attr-defined]
datasets.load_dataset = load_dataset
if steps := int(os.environ.get("TRL_SUITE_STEPS", "0")):
    _complete = GRPOConfig.__post_init__

    def _shortened(self: Any) -> None:
        self.max_steps = min(self.max_steps, steps) if self.max_steps > 0 else steps
        _complete(self)

    GRPOConfig.__post_init__ = _shortened
if SIDE == "ours":
    import trl_shim

    trl.GRPOTrainer = trl_shim.OneDomainTrainer  # type: ignore[misc]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what is apart and what is known; write down what is apart."""
    known = {row["test"] for line in _lines() if (row := json.loads(line))["side"] == SIDE}
    left, out = [], []
    for item in items:
        body = inspect.getsource(item.cls if "VLM" in item.cls.__name__ else item.function)
        is_apart = APART.search(body) or item.cls.__name__ in ("TestGRPORolloutDispatch", "TestGRPOTrainerSlow")
        if is_apart and item.name not in known:
            _write(item.name, "apart", 0.0, "")
        (out if is_apart or item.name in known else left).append(item)
    config.hook.pytest_deselected(items=out)
    items[:] = left


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    """Write down how a test ended."""
    outcome = yield
    report = outcome.get_result()
    if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
        words = str(call.excinfo.value) if call.excinfo else ""
        kind = f"{call.excinfo.typename}: " if call.excinfo else ""
        _write(item.name, report.outcome, report.duration, " ".join(f"{kind}{words}".split())[:600])


def _lines() -> list[str]:
    return RESULTS.read_text().splitlines() if RESULTS.exists() else []


def _write(test: str, outcome: str, seconds: float, words: str) -> None:
    row = {"test": test, "side": SIDE, "outcome": outcome, "seconds": round(seconds, 2), "words": words}
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
