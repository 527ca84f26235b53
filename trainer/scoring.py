"""Grading: each completion by its domain's reward; results are checked and failures counted.

Slow rewards (a judge, programs in a sandbox), which have `is_slow = True`, grade finished completions while the engine
still generates: `EarlyGrading`. One thread grades all that have come by then at a time, so that a judge's own limits on
concurrency hold; every other reward is called once at the end. Rewards are the same either way: a reward grades each row
by itself.
"""

from __future__ import annotations

import copy
import errno
import functools
import logging
import math
import os
import queue
import socket
import sysconfig
import threading
import traceback
import urllib.error
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from polyphony.curricula.records import Completion, Domain, Episode, Group, Prompt
from polyphony.rewards import Reward, find_reward
from polyphony.rewards.registry import GraderGoneError, ask, misfit, settled
from polyphony.trainer.extra_columns import Extra
from polyphony.trainer.metrics import Logged

logger = logging.getLogger(__name__)
T = TypeVar("T")


_UNREACHABLE = (
    "aiohttp.ClientConnectionError",
    "anthropic.APIConnectionError",
    "httpx.TransportError",
    "openai.APIConnectionError",
    "requests.ConnectionError",
    "requests.Timeout",
    "urllib3.MaxRetryError",
    "urllib3.TimeoutError",
)
"""What else graders raise where their judge is down or silent; by name, as a run need have none of these packages."""


class Scorer:
    """Route completions to their domains' rewards.

    A reward that raises, or returns None or NaN (as TRL reads it), gives None: that completion is left out of everything and
    counted. One that cannot reach its judge gives None for all it was asked about. One that returns infinity, no
    number or the wrong number of values is broken, and stops the run with its domain's name.

    Example: `Scorer(domains)(completions) -> [1.0, None, 0.0]`
    """

    def __init__(self, domains: Sequence[Domain], *, openings: Mapping[str, str] | None = None) -> None:
        """`openings` are thoughts that the chat template begins (`DomainData.openings`): a completion goes on with it."""
        self.openings = openings or {}
        self.rewards: dict[str, Reward] = {}
        for domain in domains:
            try:
                self.rewards[domain.name] = reward = find_reward(domain.reward)
                getattr(reward, "check_host", lambda: None)()
            except ValueError as error:
                raise ValueError(f"domains.{domain.name}.reward: {error}") from error
        self.slow = frozenset(name for name, reward in self.rewards.items() if getattr(reward, "is_slow", False))
        """Domains whose rewards mostly wait, see `polyphony.rewards.registry`."""
        self.logged = Logged()
        self.state_of: Callable[[], Any] = lambda: None
        """Returns Transformers' state of the run, as rewards get it."""
        self._told: set[tuple[str, str, str]] = set()
        """Whose reward raised what, and where."""
        self.extra: Extra | None = None
        """What rewards say of each completion by `log_extra`; None where nobody reads it."""

    def check_fit(self, prompts: Iterable[Prompt]) -> None:
        """Raise ValueError for a reward whose signature does not take what it is called with: it would fail on every row."""
        for prompt in prompts:
            said = {name for name, value in prompt.columns.items() if name != "answer" or value is not None}
            names = {*said, "prompts", "completions", "completion_ids"}
            if why := misfit(self.rewards[prompt.domain], names):
                raise ValueError(f"domains.{prompt.domain}.reward: {why}; **columns takes what a reward does not use")

    def apart(self) -> Scorer:
        """Return one with the same rewards that counts by itself what they log."""
        other = copy.copy(self)
        other.logged, other.extra = Logged(), None
        return other

    def __call__(self, completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward a completion, in order."""
        scores: list[float | None] = [None] * len(completions)
        by_domain: dict[str, list[int]] = {}
        _say_faults(completions)
        for i, completion in enumerate(completions):
            if (episode := completion.episode) is not None and episode.fault is not None:
                scores[i] = 0.0 if episode.is_forfeit else None  # what a call did not come back from must not hide it
            else:
                by_domain.setdefault(completion.prompt.domain, []).append(i)
        for name, places in by_domain.items():
            for i, score in zip(places, self._score(name, [completions[i] for i in places]), strict=True):
                scores[i] = with_own(score, completions[i].episode)
        return scores

    def _score(self, name: str, completions: list[Completion]) -> list[float | None]:
        reward = self.rewards[name]
        logged: list[tuple[str, float]] = []  # one that fails, and is asked again row by row, must not log twice
        extra: list[tuple[str, Sequence[Any]]] = []
        hooks = {
            "log_metric": lambda metric, value: logged.append((metric, float(value))),
            "log_extra": lambda column, values: extra.append((column, list(values))),
            "trainer_state": self.state_of(),
        }
        try:
            values = _call(reward, completions, hooks, opening=self.openings.get(name, ""))
        except GraderGoneError:
            raise
        except Exception as error:  # a user's may raise anything; retried one by one, so that one row costs one row
            if len(completions) == 1 or is_unreachable(error):
                self._say_raised(name, error, again=is_unreachable(error))
                return [None] * len(completions)
            return [self._score(name, [completion])[0] for completion in completions]
        scores = _as_scores(name, values, len(completions))
        self.logged.add(name, logged)
        for column, told in extra:
            if self.extra is None:
                _say_ignored(column)
            else:
                self.extra.add(name, column, completions, told)
        return scores

    def _say_raised(self, name: str, error: Exception, *, again: bool) -> None:
        """Warn of what a reward raised, once for each kind and line of code: a draw has hundreds of rows; `again` for what
        comes once a batch, and may come back after hours."""
        what, where = raised(error)
        if again or (name, what.partition(":")[0], where) not in self._told:
            self._told.add((name, what.partition(":")[0], where))
            once = "" if again else "; told once"
            logger.warning("domain %r: the reward raised %s%s", name, what, f" ({where}){once}" if where else once)

    def tried(self, completion: Completion) -> float | None:
        """Return the score of one completion and log nothing; what the reward raises is raised: for a look before a run."""
        name = completion.prompt.domain
        hooks = {"log_metric": lambda metric, value: None, "log_extra": lambda column, values: None}
        hooks |= {"trainer_state": self.state_of()}
        values = _call(self.rewards[name], [completion], hooks, opening=self.openings.get(name, ""))
        return _as_scores(name, values, 1)[0]


def raised(error: BaseException) -> tuple[str, str]:
    """Return in words what a reward raised, and where: the last file and line that is neither ours nor a library's, or the
    last of all; empty where that is ours. Of a group of errors, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not os.path.realpath(frame.filename).startswith(NOT_A_USERS)]
    theirs = [frame for frame in frames[-1:] if not os.path.realpath(frame.filename).startswith(OURS)]
    last = (own or theirs or [None])[-1]
    return f"{type(error).__name__}: {error}", f"{last.filename}:{last.lineno}" if last else ""


HOUSE = Path(__file__).resolve().parent.parent
OURS = tuple(f"{HOUSE / wing}{os.sep}" for wing in ("curricula", "launch", "rewards", "trainer"))
LIBRARIES = (os.path.realpath(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib"))
NOT_A_USERS = (*OURS, *LIBRARIES, os.path.realpath("<frozen"))
"""How the files of this house and of libraries begin."""


def with_own(score: float | None, episode: Episode | None) -> float | None:
    """Return a reward with the environment's own added, as TRL adds them: one that is not told is left out of the sum."""
    if episode is None or episode.reward is None:
        return score
    return episode.reward if score is None else score + episode.reward


def together(ask: Callable[[], list[T]], slow: Collection[str], gather: Callable[[list], list]) -> list[T]:
    """Return the answers. Raises GraderGoneError on every rank where it came up on one; collective where any domain is slow:
    only what waits can be gone."""
    if not slow:
        return ask()
    found, gone = [], None
    try:
        found = ask()
    except GraderGoneError as error:
        gone = str(error)
    for reason in filter(None, gather([gone])):
        raise GraderGoneError(reason)
    return found


def is_unreachable(error: BaseException | None) -> bool:
    """Say whether a connection failed or timed out: that is no row's fault, and asking row by row would not help.

    So one row that takes too long costs its whole batch. What an error was raised from, and what a group of errors holds,
    count as well. A process of a row's own that it killed, and a judge that answers with an error, are reachable.
    """
    if error is None or isinstance(error, BrokenPipeError | urllib.error.HTTPError):
        return False
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_unreachable, error.exceptions))
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    known = isinstance(error, ConnectionError | TimeoutError | socket.gaierror | urllib.error.URLError)
    is_off = isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    return known or is_off or not names.isdisjoint(_UNREACHABLE) or is_unreachable(error.__cause__)


LAST, FEWEST = 256, 64
"""Completions of a domain that are looked back at, and how many there must be before a run is stopped for them: one bad row
is none, a grader that is broken is seen within a few draws."""


class Failures:
    """The share of each domain's last completions that got no reward; names the prompts that got none at all.

    No checkpoint keeps it: a run that goes on once its grader is mended is not held to what that failed on before.
    """

    def __init__(self, *, most: float, acting: Collection[str] = ()) -> None:
        """`acting`: the domains where the environment may be what failed."""
        self.most, self._acting = most, acting
        """The largest share that a run goes on with."""
        self._last: dict[str, deque[bool]] = {}
        self._named: set[tuple[str, str]] = set()

    def see(self, groups: Sequence[Group]) -> None:
        """Take in a draw's groups. Raises GraderGoneError where a domain's share is past the largest."""
        for group in groups:
            self._last.setdefault(group.domain, deque(maxlen=LAST)).extend(r is None for r in group.learned)
            if not group.graded and (name := (group.domain, group.prompt_id)) not in self._named:
                self._named.add(name)
                logger.warning("domain %r: prompt %r could not be graded: its group is left out", *name)
        for domain, last in self._last.items():
            failed, seen = sum(last), len(last)
            if seen >= FEWEST and failed > self.most * seen:
                what = "its environment or reward" if domain in self._acting else "the reward"
                raise GraderGoneError(
                    f"domain {domain!r}: {what} failed on {failed} of the last {seen} completions; "
                    f"max_grader_failures allows a share of {self.most:g}"
                )


def _call(reward: Reward, completions: list[Completion], hooks: Mapping[str, Any], *, opening: str) -> list[Any]:
    is_chat = not isinstance(completions[0].prompt.prompt, str)
    texts = [opening + completion.text for completion in completions]
    episodes = [completion.episode for completion in completions]
    names = {name for completion in completions for name in completion.prompt.columns}
    columns: dict[str, list[Any]] = {n: [s.prompt.columns.get(n) for s in completions] for n in sorted(names)}
    arguments = {
        "prompts": [s.prompt.prompt for s in completions],
        "completions": [
            [dict(message) for message in episode.messages]
            if episode is not None
            else [{"role": "assistant", "content": text}]
            if is_chat
            else text
            for text, episode in zip(texts, episodes, strict=True)
        ],
        "completion_ids": [s.ids for s in completions],
        "id": [s.prompt.id for s in completions],
        "domain": [s.prompt.domain for s in completions],
    }
    instances = [episode and episode.environment for episode in episodes]
    if any(instance is not None for instance in instances):
        arguments["environments"] = instances
    return settled([ask(reward, {**columns, **arguments, **hooks})])[0]


def _say_faults(completions: Sequence[Completion]) -> None:
    """Warn of environments that failed by no call's doing, a line for each domain."""
    faults: dict[str, list[str]] = {}
    for completion in completions:
        if (episode := completion.episode) is not None and episode.fault is not None and not episode.is_forfeit:
            faults.setdefault(completion.prompt.domain, []).append(episode.fault)
    for name, told in faults.items():
        logger.warning("domain %r: its environment failed %d times, first: %s", name, len(told), told[0])


@functools.cache
def _say_ignored(column: str) -> None:
    logger.warning("log_extra: column %r of a reward is kept of training completions alone, in log_completions", column)


def _as_scores(name: str, values: Any, number: int) -> list[float | None]:
    if not isinstance(values, Iterable) or isinstance(values, str | Mapping) or getattr(values, "ndim", 1) == 0:
        raise ValueError(f"domain {name!r}: the reward returned {values!r} for {number} completions")
    values = list(getattr(values, "detach", lambda: values)())  # of numpy, of torch, of a generator
    if len(values) != number:
        raise ValueError(f"domain {name!r}: the reward returned {len(values)} values for {number} completions")
    return [_checked(name, value) for value in values]


def _checked(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"domain {name!r}: the reward returned {value!r}, which is no number") from error
    if math.isinf(number):
        raise ValueError(f"domain {name!r}: the reward returned {number}; a failed grading is None")
    return None if math.isnan(number) else number


class EarlyGrading:
    """The grading of one batch of completions, begun before the last of them is sampled.

    Example:
        ahead = EarlyGrading(scorer, prompts, read)
        completions = engine.complete(requests, on_finished=ahead.take)
        scores = ahead.scores(read(prompts, completions))
    """

    def __init__(
        self,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        read: Callable[[Sequence[Prompt], Sequence[Completion]], list[Completion]],
    ) -> None:
        self._scorer, self._prompts, self._read = scorer, prompts, read
        self._waiting: queue.SimpleQueue[tuple[int, Completion] | None] = queue.SimpleQueue()
        self._taken: set[int] = set()
        self._graded: dict[int, float | None] = {}
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def take(self, place: int, completion: Completion) -> None:
        """Take in a finished completion; called by the engine between two of its steps. Twice is once."""
        prompt = self._prompts[place]
        if prompt.domain not in self._scorer.slow or place in self._taken:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._grade, name="grading", daemon=True)
            self._thread.start()
        self._taken.add(place)
        self._waiting.put((place, self._read([prompt], [completion])[0]))

    def scores(self, completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward a completion, in order. Raises what grading ahead raised."""
        rest = [i for i in range(len(completions)) if i not in self._taken]
        if (
            self._thread is not None
        ):  # what the engine never announced waits in line: one call of a slow reward at a time
            late = [i for i in rest if completions[i].prompt.domain in self._scorer.slow]
            for i in late:
                self._waiting.put((i, completions[i]))
            rest = [i for i in rest if i not in late]
        self._waiting.put(None)
        graded = dict(zip(rest, self._scorer([completions[i] for i in rest]), strict=True))
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        graded |= self._graded
        return [graded[i] for i in range(len(completions))]

    def _grade(self) -> None:
        try:
            while batch := self._arrived():
                scores = self._scorer([completion for _, completion in batch])
                self._graded.update(zip([place for place, _ in batch], scores, strict=True))
        except BaseException as error:  # handed to the thread that waits for the scores
            self._error = error

    def _arrived(self) -> list[tuple[int, Completion]]:
        """Wait for a completion, and return it with all others that have come; empty after the last one."""
        batch = []
        entry = self._waiting.get()
        while entry is not None:
            batch.append(entry)
            if self._waiting.empty():
                return batch
            entry = self._waiting.get()
        if batch:
            self._waiting.put(None)  # the end is met again after this batch
        return batch
