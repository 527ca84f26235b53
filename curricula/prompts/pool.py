"""Prompt selection in one domain: each prompt's estimated pass rate, and which prompts to draw next.

Columns of numpy, one row a prompt, found by id: rows of the data set may come and go between runs. A draw takes prompts
that are open: UNSEEN, or ACTIVE and not waiting after a group whose rewards were all equal; beside them a small share of
those that are due for a retry. Picking and updating cost O(log N) a prompt. Nothing depends on the order of
events but the columns and the clock, so a restored pool draws what the saved one would have drawn.

`PoolSettings` has the thresholds, the retry schedule and the sampling.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from polyphony.curricula.declarations import settings
from polyphony.curricula.prompts.estimate import (
    ACTIVE,
    DEFERRED,
    IMPOSSIBLE,
    MASTERED,
    RETRIED,
    STATES,
    UNSEEN,
    WAITING,
    Band,
    RankedSet,
    State,
    find_sampling,
)
from polyphony.curricula.prompts.pool_file import Columns


@settings
class Refill:
    """Replace groups whose rewards are all equal, within the draw, by groups of other prompts of the same domain."""

    max_rounds: int = Field(default=2, ge=0)
    """Most rounds of replacement in a draw; 0: none. With half of the groups dead, two rounds leave about one in eight."""


@settings
class PoolSettings(Band):
    """Prompt selection by estimated pass rates, early stop of groups, and replacement of groups without a gradient."""

    discount: float = Field(default=0.99, ge=0.5, le=1)
    """Factor on earlier evidence at each visit of a prompt; with 0.99, 64 failures in 8 visits still count as 62."""
    sampling: str = "uniform"
    """How open prompts (UNSEEN or ACTIVE) are sampled: `uniform`, `thompson` (largest p (1 - p), with p sampled from the
    posterior), or an import path."""
    retry_share: float = Field(default=0.1, ge=0, le=1)
    """Largest share of a domain's prompts in a draw that are retries of DEFERRED, MASTERED or IMPOSSIBLE ones."""
    retry_deferred: int = Field(default=10, ge=1)
    """Draws until a DEFERRED prompt at the band's edge is retried; a policy changes noticeably in about ten. Below the edge
    the wait is inversely proportional to the mean pass rate, as the chance of a success is: 12, 22, 32, .. draws after
    one, two, three groups of eight failures, at most `retry_impossible`. An ACTIVE prompt waits `retry_deferred` draws
    after a group with equal rewards."""
    retry_mastered: int = Field(default=50, ge=1)
    """Draws until a MASTERED prompt is reviewed; forgetting is slower than learning."""
    retry_impossible: int = Field(default=100, ge=1)
    """Draws until an IMPOSSIBLE prompt is retried; eight visits showed it to be one."""
    when_exhausted: Literal["continue", "stop"] = "continue"
    """When every prompt of every domain is MASTERED or IMPOSSIBLE: go on with those nearest to the band, or stop."""
    look: int | None = Field(default=None, ge=2)
    """Early stop of a group after so many completions: if their rewards are all equal, the rest are not sampled. Half of
    `grpo.num_generations` saves up to half of what groups without a gradient cost. Prompts that nearly always fail, or
    never, are then trained on less: of the groups that eight completions would have told apart, three in five are continued
    at a pass rate of .1, four in five at .3. Null samples every group whole."""
    refill: Refill = Refill()
    start: str | None = Field(default=None, validation_alias="from", serialization_alias="from")
    """`pool.npz` of `polyphony screen`, or of an earlier run: pass rates to start from, matched by the prompts' ids."""

    def check_parts(self) -> None:
        """Raise ValueError for a sampling that does not exist, or a file to start from that is not there."""
        find_sampling(self.sampling)
        if self.start is not None and not Path(self.start).is_file():
            raise ValueError(f"pool.from: file {self.start} does not exist; `polyphony screen` writes it")

    def check_look(self, group_size: int, *, rank_rows: int = 0) -> None:
        """Raise ValueError for a `look` that is no part of a group, or where ranks share groups.

        `rank_rows` are those of a draw that each of several ranks has: a rank fills in what was not sampled from its own
        rows.
        """
        if self.look is None:
            return
        if self.look >= group_size:
            raise ValueError(f"pool.look: must be below num_generations={group_size}, got {self.look}")
        if rank_rows % group_size:
            raise ValueError(
                f"pool.look={self.look}: a rank's {rank_rows} rows of a draw (per_device_train_batch_size x "
                f"steps_per_generation) must be whole groups of num_generations={group_size}"
            )

    def check_uneven(self, joint: str) -> None:
        """Raise ValueError where ranks that generate together (`joint` says by what) would ask for unlike numbers."""
        asked, none = (
            (f"look={self.look}", "null") if self.look else (f"refill.max_rounds={self.refill.max_rounds}", "0")
        )
        if joint and (self.look or self.refill.max_rounds):
            raise ValueError(f"pool.{asked} with {joint}: use engine vllm or ray, or set it to {none}")

    def delay(self, state: State, pass_rate: float, rewards: Sequence[float]) -> int:
        """Return the draws that a prompt of this state and posterior mean waits after a group with these rewards."""
        if state is DEFERRED and max(rewards) > 0:
            return 1  # too hard so far, but it has just succeeded
        if state is DEFERRED:
            backed_off = min(self.retry_impossible, int(self.retry_deferred * self.defer_below / pass_rate))
            return max(self.retry_deferred, backed_off)
        if state is MASTERED or state is IMPOSSIBLE:
            return self.retry_mastered if state is MASTERED else self.retry_impossible
        return self.retry_deferred if min(rewards) == max(rewards) else 0


class _Posteriors(Sequence[tuple[float, float]]):
    """Those of some places, worked out where they are asked for: uniform sampling only counts them."""

    def __init__(self, pool: PromptPool, places: Sequence[int]) -> None:
        self._pool, self._of = pool, places

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, index: Any) -> Any:
        at = self._of[index]
        return [self._pool._beta(place) for place in at] if isinstance(index, slice) else self._pool._beta(at)


LEARNED = 0.5
"""Factor on earlier failures at a group that is all correct: they are of a policy that had not learned the prompt. With
their usual discount a prompt that was failed once or twice is drawn in vain five times before it is MASTERED, with this
three times. Successes are not treated so: IMPOSSIBLE stays a matter of confidence."""


class PromptPool:
    """Draw prompts of one domain, learn from their groups.

    Example:
        pool = PromptPool(["a", "b"], name="math", seed=1, settings=PoolSettings())
        pool.observe(pool.draw(1)[0], [1.0, 0.0, 0.0, 0.0])
    """

    def __init__(self, ids: Sequence[str], *, name: str, seed: int, settings: PoolSettings) -> None:
        if not ids:
            raise ValueError(f"domain {name!r}: no training prompts to draw from")
        self.ids = ids
        self.name = name
        self.seed = seed
        self.settings = settings
        self.clock = 0
        self.places: list[int] = []
        """Of the last draw."""
        self.held = 0
        """Draws before the next one whose prompts are kept from it: they are chosen, and not yet learned from."""
        self._sampling = find_sampling(settings.sampling)
        self._generator = random.Random(0)  # seeded anew at each use
        self._places = {prompt_id: place for place, prompt_id in enumerate(ids)}
        self._owed = 0.0
        self._refills = 0
        self._drawn: deque[set[int]] = deque()
        """Of the last draws, what was taken and not given back."""
        self._put(Columns.empty(ids))

    # --- drawing --------------------------------------------------------------------------------------------------

    def draw(self, n: int) -> list[str]:
        """Return `n` prompts for the next draw, different ones as long as there are enough.

        Of those that wait, at most `retry_share`, and more only where open ones do not suffice.
        """
        self._return_taken()
        self.clock += 1
        self._refills = 0
        self._wake()
        places = self._take_due(n)
        places += self._take_open(n - len(places))
        places += self._take_waiting(n - len(places))
        while len(places) < n and self._give_back():  # a domain so small that it is all being sampled
            places += self._take_open(n - len(places))
            places += self._take_waiting(n - len(places))
        self._drawn.append(self._taken.difference(*self._drawn))
        while len(places) < n:  # fewer prompts than are asked for
            places += places[: n - len(places)]
        self.places = places
        return [self.ids[place] for place in places]

    def refill(self, n: int) -> list[str]:
        """Return up to `n` further prompts for the same draw: open ones that it does not have yet."""
        self._refills += 1
        places = self._take_open(n)
        self._drawn[-1].update(places)
        return [self.ids[place] for place in places]

    def reserve(self, n: int) -> list[str]:
        """Return up to `n` open prompts that refills may add to the last draw, and leave them open."""
        found = self.refill(n)
        for place in (self._places[prompt_id] for prompt_id in found):
            self._taken.remove(place)
            self._drawn[-1].remove(place)
            self._open.add(place)
        return found

    @property
    def has_open(self) -> bool:
        """True where a prompt is UNSEEN or ACTIVE."""
        return self._counts[UNSEEN] + self._counts[ACTIVE] > 0

    @property
    def is_exhausted(self) -> bool:
        """True where every prompt is MASTERED or IMPOSSIBLE."""
        return self._counts[MASTERED] + self._counts[IMPOSSIBLE] == len(self.ids)

    def counts(self) -> dict[State, int]:
        """Return how many prompts are in each state."""
        return dict(zip(STATES, self._counts, strict=True))

    # --- learning -------------------------------------------------------------------------------------------------

    def observe(self, prompt_id: str, rewards: Sequence[float]) -> None:
        """Take in the graded rewards of one visit; with none graded, nothing was learned."""
        if not rewards:
            return
        place = self._places[prompt_id]
        is_share = min(rewards) >= 0 and max(rewards) <= 1  # nearly always
        passed = sum(rewards if is_share else [min(1.0, max(0.0, reward)) for reward in rewards])
        discount, failed = self.settings.discount, len(rewards) - passed
        self.successes[place] = more = discount * self.successes[place] + passed
        self.failures[place] = less = (discount if failed else min(discount, LEARNED)) * self.failures[place] + failed
        self.visits[place] = visits = self.visits.item(place) + 1
        successes, failures = 1.0 + float(more), 1.0 + float(less)
        state = self.settings.classify_one(successes, failures, visits)
        self._counts[self.state.item(place)] -= 1
        self._counts[state] += 1
        self.state[place] = int(state)  # numpy would ask an Enum for what it does not have
        self.due[place] = self.clock + self.settings.delay(state, successes / (successes + failures), rewards)
        if place not in self._taken:
            self._open.remove(place)
            self._enter(place)

    def posterior(self, prompt_id: str) -> tuple[float, float]:
        """Return the parameters of the prompt's Beta posterior."""
        return self._beta(self._places[prompt_id])

    def state_of(self, prompt_id: str) -> State:
        return STATES[self.state[self._places[prompt_id]]]

    def place_of(self, prompt_id: str) -> int:
        """Return the row of a prompt in the columns."""
        return self._places[prompt_id]

    # --- remembering ----------------------------------------------------------------------------------------------

    def columns(self) -> Columns:
        """Return what is known, for saving."""
        return Columns(
            ids=self.ids,
            successes=self.successes,
            failures=self.failures,
            visits=self.visits,
            due=self.due,
            clock=self.clock,
        )

    def adopt(self, saved: Columns) -> int:
        """Take over what is known of prompts that are here too; the others stay UNSEEN. Return how many were found."""
        here = np.fromiter((self._places.get(i, -1) for i in saved.ids), dtype=np.int64, count=len(saved.ids))
        found = here >= 0
        mine = Columns.empty(self.ids)
        for name in ("successes", "failures", "visits"):
            getattr(mine, name)[here[found]] = getattr(saved, name)[found]
        mine.due[here[found]] = saved.due[found] - saved.clock + self.clock
        self._put(mine)
        return int(found.sum())

    def state_dict(self) -> dict[str, Any]:
        """Return what the columns do not say; JSON-able."""
        held = list(self._drawn)[-self.held :] if self.held else []
        taken = [[self.ids[place] for place in sorted(places)] for places in held]
        return {"clock": self.clock, "owed": self._owed} | ({"taken": taken} if taken else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`; `adopt` the saved columns afterwards."""
        self.clock, self._owed = state["clock"], state["owed"]
        self._drawn = deque({self._places[i] for i in ids if i in self._places} for ids in state.get("taken", ()))

    # --- inside ---------------------------------------------------------------------------------------------------

    def _put(self, columns: Columns) -> None:
        """Build everything that follows from the columns."""
        self.successes, self.failures = columns.successes, columns.failures
        self.visits, self.due = columns.visits, columns.due
        self.state = self.settings.classify(self.successes, self.failures, self.visits)
        self._counts = np.bincount(self.state, minlength=len(STATES)).tolist()
        self._open = RankedSet((self.state <= ACTIVE) & (self.due <= self.clock))
        # by number: a mapping would ask an Enum for its hash
        self._waiting = [self._queue(state) if state in WAITING else [] for state in STATES]
        self._taken: set[int] = set().union(*self._drawn)
        for place in self._taken:
            self._open.remove(place)

    def _queue(self, state: State) -> list[tuple[int, int]]:
        places = np.flatnonzero((self.state == state) & ~self._open.member)
        return sorted(zip(self.due[places].tolist(), places.tolist(), strict=True))

    def _beta(self, place: int) -> tuple[float, float]:
        return 1.0 + self.successes.item(place), 1.0 + self.failures.item(place)

    def _enter(self, place: int) -> None:
        state, due = self.state.item(place), self.due.item(place)
        if state <= ACTIVE and due <= self.clock:
            self._open.add(place)
        else:
            heapq.heappush(self._waiting[state], (due, place))

    def _wake(self) -> None:
        """Open the ACTIVE prompts whose rest is over."""
        while self._due_head(ACTIVE) is not None:
            self._open.add(heapq.heappop(self._waiting[ACTIVE])[1])

    def _return_taken(self) -> None:
        while len(self._drawn) > self.held:
            self._give_back()

    def _give_back(self) -> bool:
        """Return what the oldest of the last draws took; False where none has anything."""
        if not self._drawn:
            return False
        given = self._drawn.popleft()
        self._taken -= given
        for place in given:
            self._enter(place)
        return True

    def _take_due(self, n: int) -> list[int]:
        """Take up to the owed share of prompts whose turn has come, those that have waited longest first."""
        self._owed += self.settings.retry_share * n
        taken: list[int] = []
        while len(taken) < min(n, int(self._owed)):
            heads = [(head[0], state) for state in RETRIED if (head := self._due_head(state)) is not None]
            if not heads:
                break
            taken.append(self._pop(min(heads)[1]))
        self._owed = min(1.0, self._owed - len(taken))  # what nobody waited for lapses
        return taken

    def _take_waiting(self, n: int) -> list[int]:
        """Take prompts before their turn: those that rest, then of the longest waiting of each state the most in doubt."""
        taken: list[int] = []
        while len(taken) < n:
            heads = {state: head[1] for state in WAITING if (head := self._head(state)) is not None}
            if not heads:
                break
            taken.append(self._pop(max(heads, key=lambda state: (state is ACTIVE, self._doubt(heads[state])))))
        return taken

    def _doubt(self, place: int) -> float:
        """Return p (1 - p) of a prompt's posterior mean: the variance of its rewards."""
        successes, failures = self._beta(place)
        return successes * failures / (successes + failures) ** 2

    def _take_open(self, n: int) -> list[int]:
        if n <= 0:
            return []
        generator = self._generator
        generator.seed(f"{self.seed}/{self.name}/{self.clock}/{self._refills}")
        candidates = []
        size = len(self._open)
        for left in range(size, max(0, size - self._sampling.candidates(n)), -1):
            candidates.append(self._open.pop(generator.randrange(left)))
        chosen = self._sampling.choose(_Posteriors(self, candidates), n, generator)
        places = [candidates[i] for i in chosen]
        self._taken.update(places)
        for place in set(candidates) - self._taken:
            self._open.add(place)
        return places

    def _head(self, state: State) -> tuple[int, int] | None:
        """Return the first prompt of a queue; entries that a later visit has overtaken are dropped."""
        queue = self._waiting[state]
        while queue and self._is_stale(*queue[0], state):
            heapq.heappop(queue)
        return queue[0] if queue else None

    def _due_head(self, state: State) -> tuple[int, int] | None:
        """Return the first prompt of a queue where its turn has come."""
        queue = self._waiting[state]
        if not queue or queue[0][0] > self.clock:  # overtaken or not: what is behind comes later still
            return None
        head = self._head(state)
        return head if head is not None and head[0] <= self.clock else None

    def _is_stale(self, due: int, place: int, state: State) -> bool:
        return place in self._taken or self.due.item(place) != due or self.state.item(place) != state

    def _pop(self, state: State) -> int:
        place = heapq.heappop(self._waiting[state])[1]
        self._taken.add(place)
        return place
