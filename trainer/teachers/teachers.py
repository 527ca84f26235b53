"""The teachers of a run: which weights are loaded for them, and how they score completions, one teacher at a time.

Adapters share one base: with full weights a frozen copy, which is `self@start` too; with a policy that is an adapter itself
the policy's own base, whose tensors are not copied. A teacher of its own weights waits in the memory of the host where
there are several. Every rank runs every teacher on as many rows, because forward passes of sharded weights are collective;
it asks one behind an endpoint about its own rows, as soon as they are graded.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from polyphony.curricula.records import Completion
from polyphony.rewards.registry import settled
from polyphony.trainer.policy import Policy
from polyphony.trainer.scoring import together
from polyphony.trainer.teachers.lesson import Lesson

Row = tuple[list[int], list[int]]
"""Token ids that a teacher reads, and that it scores."""


class Teachers:
    """Score completions with the teachers' weights; collective over ranks.

    Example: `Teachers(trainer.policy, lesson).logps(completions)[0].shape` is `(tokens,)`.
    """

    def __init__(self, policy: Policy, lesson: Lesson) -> None:
        """Load what the policy does not hold. Raises ValueError where `self@start` would be an adapter."""
        self.policy, self.lesson = policy, lesson
        trainer = policy.trainer
        self._is_sharded = trainer.is_fsdp_enabled or (
            trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
        )
        kinds = {found.kind for found in lesson.weights.values()}
        self._here = [name for name in lesson.teachers if lesson.weights[name].kind != "endpoint"]
        has_adapter = isinstance(trainer.model, PeftModel)
        if "start" in kinds and has_adapter and isinstance(lesson.model, PeftModel):
            raise ValueError(
                "self@start: the policy began with an adapter that it goes on training: name its folder as a teacher"
            )
        self._start = None  # for `self@start` and for adapters
        if "adapter" in kinds or ("start" in kinds and not has_adapter):
            self._start = self._prepared(self._with_adapters(self._base()))
        paths = sorted({found.path for found in lesson.weights.values() if found.kind == "checkpoint"})
        self._loaded = {path: self._prepared(self._load(path)) for path in paths}
        self._is_waiting = (
            not self._is_sharded and trainer.accelerator.device.type != "cpu" and len(self._loaded) > 1
        )  # in the host's memory
        for loaded in self._loaded.values() if self._is_waiting else ():
            loaded.to("cpu")

    def heard(self, completions: Sequence[Completion]) -> list[Completion]:
        """Return them with what teachers behind endpoints say; collective where there are such.

        Raises GraderGoneError on every rank where one of them answers nobody any more.
        """
        if not self.lesson.endpoints:
            return list(completions)
        return together(lambda: self._asked(completions), self.lesson.endpoints, gather_object)

    def _asked(self, completions: Sequence[Completion]) -> list[Completion]:
        found, places = list(completions), {}
        asking = []
        for name, endpoint in self.lesson.endpoints.items():
            rows = self._rows(name, completions)
            places[name] = [i for i, row in rows.items() if row is not None]
            asking.append(endpoint.ask([row for row in rows.values() if row is not None]))
            for i in rows:
                found[i] = replace(found[i], teacher_logps=(math.nan,) * len(found[i].ids))
        for told, of in zip(settled(asking), places.values(), strict=True):
            for logps, i in zip(told, of, strict=True):
                found[i] = replace(found[i], teacher_logps=logps)
        return found

    def _rows(self, name: str, completions: Sequence[Completion]) -> dict[int, Row | None]:
        """Return by place what a teacher reads and what it scores of each of its completions; None where it has no room, and
        for a token that only pads the policy's embedding, of which it has fewer."""
        of_domain, known = self.lesson.of_domain, self._known(name)
        places = [i for i, c in enumerate(completions) if of_domain.get(c.prompt.domain) == name]
        read = self.lesson.read([completions[i] for i in places])
        told = [(i, ids, list(completions[i].ids)) for i, ids in zip(places, read, strict=True)]
        return {
            i: (list(ids), said) if ids is not None and max(said, default=0) < known else None for i, ids, said in told
        }

    def _known(self, name: str) -> float:
        """Return how many tokens a teacher's embedding has; one behind an endpoint answers nothing for others."""
        loaded = self._loaded.get(self.lesson.weights[name].path)
        return math.inf if loaded is None else _inner(loaded).config.get_text_config().vocab_size

    def logps(self, completions: Sequence[Completion]) -> list[torch.Tensor | None]:
        """Return, for each completion of this rank, its teacher's log-probability of each token [T]; None without one.

        NaN where the teacher has none. What is behind an endpoint has been `heard`.
        """
        device = self.policy.trainer.accelerator.device
        found = [None if (t := c.teacher_logps) is None else torch.tensor(t, device=device) for c in completions]
        for name in self._here:
            rows = self._rows(name, completions)
            most = max(gather_object([len(rows)]))
            if not most:
                continue
            # a rank with fewer rows runs one again, which nobody reads
            ids = list(completions[0].prompt.ids)
            spare = next(filter(None, rows.values()), (ids, ids[-1:]))
            scored = self._score(name, [row or spare for row in rows.values()] + [spare] * (most - len(rows)))
            for (i, row), logps in zip(rows.items(), scored[: len(rows)], strict=True):
                found[i] = torch.full((len(completions[i].ids),), math.nan, device=device) if row is None else logps
        return found

    def _score(self, name: str, rows: Sequence[Row]) -> list[torch.Tensor]:
        """Score in micro-batches of rows of like length."""
        size = self.policy.trainer.args.per_device_train_batch_size
        order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
        scored: dict[int, torch.Tensor] = {}
        with self._ready(name) as model:
            for at in range(0, len(order), size):
                places = order[at : at + size]
                asked, said = zip(*(rows[i] for i in places), strict=True)
                logps, mask = self.policy.token_scores(asked, said, model=model)
                for i, row, m in zip(places, logps, mask.bool(), strict=True):
                    scored[i] = row[m]
        return [scored[i] for i in range(len(rows))]

    @contextmanager
    def _ready(self, name: str) -> Iterator[Any]:
        """Have a teacher's weights where they compute meanwhile, its adapter switched on."""
        weights, trainer = self.lesson.weights[name], self.policy.trainer
        if weights.kind == "current":
            yield trainer.model
        elif weights.kind == "checkpoint":
            model = self._loaded[weights.path]
            if self._is_waiting:
                model.to(trainer.accelerator.device)
            yield model
            if self._is_waiting:
                model.to("cpu")
        elif weights.kind == "adapter":
            _inner(self._start).set_adapter(name)
            yield self._start
        else:
            model = trainer.model if self._start is None else self._start
            if not isinstance(_inner(model), PeftModel):
                yield model
                return
            with _inner(model).disable_adapter():
                yield model

    def _base(self) -> Any:
        """Return the frozen start of the policy, for itself and for adapters on it."""
        mine, model = self.policy.trainer.model, self.lesson.model
        if isinstance(model, str) and (self._is_sharded or not isinstance(mine, PeftModel)):
            return self._load(model)
        if self._is_sharded:
            raise ValueError(
                "self@start and adapters as teachers need the policy by its name where its weights are sharded"
            )
        # a copy of the modules; of the tensors only where they are trained
        shared = {id(p): p for p in mine.parameters()} if isinstance(mine, PeftModel) else {}
        copied = copy.deepcopy(mine, shared)
        return copied.unload() if isinstance(copied, PeftModel) else copied

    def _with_adapters(self, base: Any) -> Any:
        for name, weights in self.lesson.weights.items():
            if weights.kind == "adapter" and isinstance(base, PeftModel):
                base.load_adapter(weights.path, adapter_name=name)
            elif weights.kind == "adapter":
                base = PeftModel.from_pretrained(base, weights.path, adapter_name=name)
        return base

    def _load(self, path: str) -> Any:
        trainer = self.policy.trainer
        ours = trainer.accelerator.unwrap_model(trainer.model)
        model: Any = create_model_from_path(
            path,
            dtype=ours.dtype,
            device_map=None,
            trust_remote_code=trainer.args.trust_remote_code,
            attn_implementation=ours.config._attn_implementation,
        )
        rows = ours.config.get_text_config().vocab_size
        if model.config.get_text_config().vocab_size > rows:  # padding, which would take a share of the probability
            model.resize_token_embeddings(rows, mean_resizing=False)
        add_fused_lm_head(model, temperature=trainer.temperature)
        return model

    def _prepared(self, model: Any) -> Any:
        """Return it frozen, where and as sharded as the policy is."""
        trainer = self.policy.trainer
        model.eval().requires_grad_(requires_grad=False)
        if trainer.is_deepspeed_enabled:
            return prepare_deepspeed(model, trainer.accelerator)
        if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 2:
            return fsdp2_prepare_model(trainer.accelerator, model)  # TRL's splits what only the first rank has loaded
        if trainer.is_fsdp_enabled:
            return prepare_fsdp(model, trainer.accelerator)
        return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def _inner(model: Any) -> Any:
    """Return what DeepSpeed has wrapped."""
    return getattr(model, "module", model)
