"""`code`: the completion's Python program against stdin/stdout cases or tests, run in the sandbox."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

from polyphony.rewards.answers import answer_region, fenced_blocks, final_answer
from polyphony.rewards.sandbox.client import Limits, Program, SandboxError, isolation

logger = logging.getLogger(__name__)

_PYTHON = ("python", "python3", "py")


def program_of(completion: Any) -> str:
    """Return the last fenced block of a completion that says it is Python, else the last that says nothing.

    A block that is cut off reaches to the end. Without any, the program is the `<answer>`, or the whole completion.
    """
    text = answer_region(completion)
    blocks = fenced_blocks(text)
    named = [block for language, block in blocks if language in _PYTHON]
    unnamed = [block for language, block in blocks if not language]
    return (named or unnamed or [final_answer(text, sources=["tag"]) or text])[-1]


def same_output(printed: str, expected: str) -> bool:
    """Compare line by line, but for white space at the ends of lines and empty lines at the end."""
    return [line.rstrip() for line in printed.rstrip().split("\n")] == [
        line.rstrip() for line in expected.rstrip().split("\n")
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """1.0 where the program passes everything, else 0.0; None where the sandbox failed or the tests test nothing.

    A row has `tests`, a list (or its JSON) of `{"input", "output"}` for a program that reads stdin and prints, or
    `test_code`, assertions about what the program defines, returns and raises (what it prints they do not see; see
    `rewards/sandbox/test_side.py`). A program must end with status 0 for its output to count.
    """

    is_slow: ClassVar[bool] = True
    partial_credit: bool = False
    """Give the share of cases or checks that hold instead. Off: a share also pays for guessing the easy cases."""
    limits: Limits | dict = field(default_factory=Limits)
    """What one run may use, as `Limits` or its fields."""
    workers: int | None = None
    """Programs at a time; None takes one a core, at most 16."""
    site_packages: bool = False
    """Let programs import what is installed beside Python (numpy, ..): starts are slower."""

    def __post_init__(self) -> None:
        if isinstance(self.limits, dict):
            unknown = set(self.limits) - set(Limits.__slots__)
            if unknown:
                raise ValueError(f"code: unknown limits {sorted(unknown)}; allowed: {', '.join(Limits.__slots__)}")
            object.__setattr__(self, "limits", Limits(**self.limits))
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"code: workers must be at least 1, got {self.workers}")

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: Any = None,
        *,
        tests: list | None = None,
        test_code: list | None = None,
        **columns: Any,
    ) -> list[float | None]:
        none = [None] * len(completions)
        rows = zip(completions, tests or none, test_code or none, strict=True)
        jobs = [(program_of(completion), _checks(cases, source)) for completion, cases, source in rows]
        isolation()  # found once, before the threads ask for it
        with ThreadPoolExecutor(self.workers or min(os.cpu_count() or 1, 16)) as pool:
            return list(pool.map(lambda job: self._score(*job), jobs))

    def _score(self, program: str, checks: str | list[dict[str, str]]) -> float | None:
        for attempt in ("first", "second"):
            try:
                passed, total = self._count(program, checks)
            except (SandboxError, OSError) as error:
                logger.warning("code: %s attempt in the sandbox failed: %s", attempt, error)
                continue
            if total == 0:
                logger.warning("code: these tests are no Python, check nothing or can not be run: %.200r", checks)
                return None
            return passed / total if self.partial_credit else float(passed == total)
        return None

    def _count(self, program: str, checks: str | list[dict[str, str]]) -> tuple[int, int]:
        assert isinstance(self.limits, Limits)
        passed = 0
        with Program(program, limits=self.limits, site_packages=self.site_packages) as running:
            if isinstance(checks, str):
                verdict = running.test(checks)
                return verdict.passed, verdict.total
            for case in checks:
                run = running.run(case["input"])
                holds = run.ended == "exit" and same_output(run.stdout.decode(errors="replace"), case["output"])
                passed += holds
                if not holds and not self.partial_credit:
                    break
        return passed, len(checks)


def _checks(tests: Any, test_code: Any) -> str | list[dict[str, str]]:
    """Return a row's test source or cases. Raises ValueError where it has neither or both."""
    if bool(tests) == bool(test_code):
        raise ValueError(f"code: a row needs either tests or test_code, got {tests!r:.100} and {test_code!r:.100}")
    if test_code:
        return str(test_code)
    cases = json.loads(tests) if isinstance(tests, str) else tests
    if not isinstance(cases, Sequence) or not all(isinstance(c, dict) and {"input", "output"} <= set(c) for c in cases):
        raise ValueError(f'code: tests must be a list of {{"input", "output"}}, got {tests!r:.200}')
    return [{"input": str(case["input"]), "output": str(case["output"])} for case in cases]
