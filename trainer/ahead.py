"""Grade what is finished while the engine still generates, for rewards that mostly wait: a judge, programs in jails.

A reward says so by `is_slow = True`. Its completions are graded in one thread, all that have come by then at a time, so
that a judge's own limits on concurrency hold; every other reward is called once at the end, as without this. Rewards are
the same either way: a reward grades each row by itself.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from polyphony.trainer.data import Prompt
from polyphony.trainer.rollouts import Completion
from polyphony.trainer.scoring import Sample, Scorer


class Ahead:
    """The grading of one batch of completions, begun before the last of them is sampled.

    Example:
        ahead = Ahead(scorer, prompts, to_samples)
        completions = engine.complete(requests, on_finished=ahead.take)
        scores = ahead.scores(to_samples(prompts, completions))
    """

    def __init__(
        self,
        scorer: Scorer,
        prompts: Sequence[Prompt],
        to_samples: Callable[[Sequence[Prompt], Sequence[Completion]], list[Sample]],
    ) -> None:
        self._scorer, self._prompts, self._to_samples = scorer, prompts, to_samples
        self._waiting: queue.SimpleQueue[tuple[int, Sample] | None] = queue.SimpleQueue()
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
        self._waiting.put((place, self._to_samples([prompt], [completion])[0]))

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """Return one reward a sample, in order. Raises what grading ahead raised."""
        rest = [i for i in range(len(samples)) if i not in self._taken]
        if (
            self._thread is not None
        ):  # what the engine never announced waits in line: one call of a slow reward at a time
            late = [i for i in rest if samples[i].prompt.domain in self._scorer.slow]
            for i in late:
                self._waiting.put((i, samples[i]))
            rest = [i for i in rest if i not in late]
        self._waiting.put(None)
        graded = dict(zip(rest, self._scorer([samples[i] for i in rest]), strict=True))
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        graded |= self._graded
        return [graded[i] for i in range(len(samples))]

    def _grade(self) -> None:
        try:
            while batch := self._arrived():
                scores = self._scorer([sample for _, sample in batch])
                self._graded.update(zip([place for place, _ in batch], scores, strict=True))
        except BaseException as error:  # handed to the thread that waits for the scores
            self._error = error

    def _arrived(self) -> list[tuple[int, Sample]]:
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
