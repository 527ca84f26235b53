"""The decoder as an engine of the product: `rollouts.engine: tests.experiments.fast.engine:LabEngine`.

Needs no vLLM start, and has one thread; for the lab's architecture only.
"""

from __future__ import annotations

from collections.abc import Sequence

from polyphony.curricula.records import Completion
from polyphony.trainer.engine.engine import Engine
from polyphony.trainer.engine.vllm import OnFinished, Request
from tests.experiments.fast.decoder import Decoder


class LabEngine(Engine):
    """Sample from a copy of the policy's weights, in the trainer's process."""

    def _init_vllm(self) -> None:
        if not self.sampling.is_the_policys:
            raise ValueError(f"the fast lab's engine samples from the whole distribution only, got {self.sampling}")
        self._copy()

    def sync_weights(self) -> None:
        """Copy the policy's present weights."""
        self._copy()
        self.version += 1

    def complete(self, requests: Sequence[Request], on_finished: OnFinished | None = None) -> list[Completion]:
        """Sample one completion a request, in order."""
        if not requests:
            return []
        sampled = self.decoder.sample(
            [r.prompt_ids for r in requests],
            seeds=[r.seed for r in requests],
            most=[r.max_tokens for r in requests],
            temperature=0.0 if all(r.is_greedy for r in requests) else self.sampling.temperature,
        )
        return [Completion(ids=s.ids, logps=s.logps, version=self.version) for s in sampled]

    def _copy(self) -> None:
        named = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.decoder = Decoder(named, self.model.config)
