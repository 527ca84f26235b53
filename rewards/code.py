"""`code`: the completion's Python program against stdin/stdout cases or tests, run in the sandbox."""

from __future__ import annotations

import ast
import logging
import os
import re
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, ClassVar, Literal

from polyphony.rewards.answers import answer_region, fenced_blocks, final_answer
from polyphony.rewards.code_cases import MAX_OUTPUT_BYTES, Altered, Case, altered, read_checks
from polyphony.rewards.registry import check_arguments, refusal, tell
from polyphony.rewards.sandbox.calls import TOLERANCE
from polyphony.rewards.sandbox.client import Limits, Program, SandboxError, require_isolation

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
    """Compare line by line and word by word; numbers with decimals by `TOLERANCE`, but whole ones exactly."""
    if printed == expected:
        return True
    lines, wanted = ([line.split() for line in text.rstrip().split("\n")] for text in (printed, expected))
    return list(map(len, lines)) == list(map(len, wanted)) and all(
        _same_word(*words) for pair in zip(lines, wanted, strict=True) for words in zip(*pair, strict=True)
    )


_NUMBER = re.compile(r"[-+]?(?:\d+(\.\d*)?|(\.\d+))([eE][-+]?\d{1,4})?", re.ASCII)


def _same_word(word: str, wanted: str) -> bool:
    if word == wanted:
        return True
    numbers = _NUMBER.fullmatch(word), _NUMBER.fullmatch(wanted)
    decimals = [any(number.groups()) for number in numbers if number]
    if len(decimals) < 2 or not any(decimals):  # 007 is no 7 where digits are all there is
        return False
    value, target = Decimal(word), Decimal(wanted)
    return value == target or (decimals[1] and abs(value - target) <= Decimal(TOLERANCE) * max(1, abs(target)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Code:
    """1.0 where the program passes everything, else 0.0; None where the sandbox failed or the tests test nothing.

    A row has `tests`, `{"input", "output"}` for a program that reads stdin and prints, or `test_code`, assertions about
    what the program defines, returns and raises (see `rewards/sandbox/test_side.py`); `code_cases` says in which shapes.
    A program must end with status 0 for its output to count. A row whose tests are in no such shape has None.
    """

    is_slow: ClassVar[bool] = True
    version: ClassVar[int] = 3
    partial_credit: bool = False
    """Give the share of cases or checks that hold instead. Off: a share also pays for guessing the easy cases."""
    limits: Limits | dict = field(default_factory=Limits)
    """What one run may use, as `Limits` or its fields."""
    workers: int | None = None
    """Programs at a time; None takes one a core, at most 16."""
    site_packages: bool = False
    """Let programs import what is installed beside Python (numpy, ..): starts are slower."""
    sandbox: Literal["limits"] | None = None
    """`limits` runs programs even where a host offers no namespaces, no bubblewrap and no Landlock; the strongest level
    that there is is taken all the same. `polyphony doctor` says what stays open."""

    def __post_init__(self) -> None:
        if isinstance(self.limits, dict):
            check_arguments(Limits, self.limits, where="code: limits")
            object.__setattr__(self, "limits", Limits(**self.limits))
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"code: workers must be at least 1, got {self.workers}")
        if self.sandbox not in (None, "limits"):
            raise ValueError(f"code: sandbox is limits or left out, got {self.sandbox!r}")

    def check_host(self) -> None:
        """Raise ValueError where this host has no sandbox that this reward may use."""
        try:
            require_isolation(may_be_limits=self.sandbox == "limits")
        except SandboxError as error:
            raise ValueError(f"code: {error}") from None

    def __call__(
        self,
        prompts: list,
        completions: list,
        completion_ids: Any = None,
        *,
        tests: list | None = None,
        test_code: list | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        if tests is None and test_code is None:
            raise ValueError("code: rows need a column tests or test_code")
        none = [None] * len(completions)
        rows = zip(completions, none if tests is None else tests, none if test_code is None else test_code, strict=True)
        jobs = [(program_of(completion), _checks(cases, source)) for completion, cases, source in rows]
        require_isolation(may_be_limits=self.sandbox == "limits")  # found once, before the threads ask for it
        with ThreadPoolExecutor(self.workers or min(os.cpu_count() or 1, 16)) as pool:
            counts = list(pool.map(lambda job: self._ask(*job), jobs))
        # what the clock ended early has a second run, now that no other program takes its time: then it is 0
        counts = [
            self._ask(*job) if count.ended == "stalled" else count for job, count in zip(jobs, counts, strict=True)
        ]
        graded = [count for count in counts if count.total]
        tell(log_metric, exhausted=[c.ended in ("timeout", "stalled") for c in graded])
        tell(log_metric, suspected_tricks=[c.is_trick for c in graded], refused_calls=[c.unlisted > 0 for c in graded])
        return [self._score(count) for count in counts]

    def unreadable(self, tests: Any = None, test_code: Any = None, **columns: Any) -> str | None:
        """Return why a row's reference can not be read; None where it can."""
        return refusal(read_checks, tests, test_code)

    def remark(self, tests: Any = None, test_code: Any = None, **columns: Any) -> str | None:
        """Return that a row's tests have no constant to alter; None where they have, or are no assertions.

        Such a row is graded as any other where its tests hold beside the program. Where they ask for a run inside its
        process, a pass cannot be told from a trick: there is no verdict, or 0 where the run beside it failed.
        """
        checks = read_checks(tests, test_code)
        if not isinstance(checks, str) or altered(checks) is not None:
            return None
        return "its tests have no expected constant to alter: what only a run inside the program could show is no pass"

    def reads(self, completion: Any, prompt: Any = None, /, **columns: Any) -> str | None:
        """Return the program of a completion, whatever its layout."""
        program = program_of(completion)
        try:
            return ast.dump(ast.parse(program)) if program.strip() else None
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return program

    def _ask(self, program: str, checks: str | list[Case] | None) -> _Count:
        """Return what the sandbox counts; nothing where it failed twice or the tests test nothing."""
        if checks is None:
            return _Count()
        for attempt in ("first", "second"):
            try:
                count = self._count(program, checks)
            except (SandboxError, OSError) as error:
                logger.warning("code: %s attempt in the sandbox failed: %s", attempt, error)
                continue
            if count.total == 0:
                logger.warning("code: these tests are no Python, check nothing or can not be run: %.200r", checks)
            return count
        return _Count()

    def _score(self, count: _Count) -> float | None:
        if not count.total:
            return None
        return count.passed / count.total if self.partial_credit else float(count.passed == count.total)

    def _count(self, program: str, checks: str | list[Case]) -> _Count:
        assert isinstance(self.limits, Limits)
        passed, ended = 0, "exit"
        limits: Limits = self.limits
        if not isinstance(checks, str):
            longest = max(len(case.expected.encode(errors="replace")) for case in checks)
            limits = replace(limits, output_bytes=max(limits.output_bytes, min(2 * longest, MAX_OUTPUT_BYTES)))
        with Program(program, limits=limits, site_packages=self.site_packages) as running:
            if isinstance(checks, str):
                verdict = running.test(checks)
                other = altered(checks) if verdict.needs_inside else None
                if other is not None:
                    return self._count_inside(program, other)
                return _Count(
                    passed=verdict.passed, total=verdict.total, ended=verdict.ended, unlisted=verdict.unlisted
                )
            unlisted = 0
            for case in checks:
                run = running.run(case.given)
                holds = run.ended == "exit" and same_output(run.stdout.decode(errors="replace"), case.expected)
                passed, unlisted = passed + holds, run.unlisted
                ended = run.ended if ended != "stalled" and run.ended in ("timeout", "stalled") else ended
                if not holds and not self.partial_credit:
                    break
        return _Count(passed=passed, total=len(checks), ended=ended, unlisted=unlisted)

    def _count_inside(self, program: str, other: Altered) -> _Count:
        """Ask the program's own process. It may answer for itself, so nothing counts but passing these tests and not
        the altered ones, each several times and in an order that no clock tells: guesses pass one time in six at most."""
        assert isinstance(self.limits, Limits)
        tests, total = other.unaltered, 1
        again = [tests, tests, other.source, other.source]
        secrets.SystemRandom().shuffle(again)
        for source in (tests, *again):
            with Program(program, limits=self.limits, site_packages=self.site_packages) as running:
                verdict = running.test_inside(source)
            if source is tests and (verdict.passed < verdict.total or not verdict.total):
                return _Count(total=max(verdict.total, 1), ended=verdict.ended, unlisted=verdict.unlisted)
            if source is not tests and verdict.passed > total - other.failures:
                logger.warning("code: a program passes its tests whatever they expect, which counts as 0")
                return _Count(total=total, is_trick=True, unlisted=verdict.unlisted)
            total = verdict.total
        return _Count(passed=total, total=total, unlisted=verdict.unlisted)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Count:
    """How many checks hold of how many (0: no verdict), and how the run that decided ended."""

    passed: int = 0
    total: int = 0
    ended: str = "exit"
    """`timeout` or `stalled` where a limit of time ended it (`polyphony.rewards.sandbox.client.Execution`)."""
    is_trick: bool = False
    """Whether it passed altered tests too."""
    unlisted: int = 0
    """System calls that are not on the sandbox's allow-list."""


_told: set[str] = set()
"""Reasons for which rows had no verdict that the log has."""


def _checks(tests: Any, test_code: Any) -> str | list[Case] | None:
    """Return a row's test source or cases; None where it has none that can be read, told once per reason."""
    try:
        return read_checks(tests, test_code)
    except ValueError as error:
        if str(error) not in _told:
            _told.add(str(error))
            logger.warning("code: %s: %.200r", error, tests if tests is not None else test_code)
        return None
