"""The teachers of a run: which weights are loaded for them, and how they score completions, one teacher at a time.

Adapters share one base: with full weights a frozen copy, which is `self@start` too; with a policy that is an adapter itself
the policy's own base, whose tensors are not copied. A teacher of its own weights waits in the memory of the host where
there are several. Every rank runs every teacher on as many rows, because forward passes of sharded weights are collective.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, create_model_from_path

from polyphony.curricula.records import Completion, Domain, Prompt
from polyphony.trainer.domains import DomainData, context_of
from polyphony.trainer.policy import Policy
from polyphony.trainer.teachers.context import in_context
from polyphony.trainer.teachers.settings import TeacherSettings
from polyphony.trainer.teachers.weights import TeacherWeights, check_vocabulary


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """Who teaches which domain, found and checked before weights are loaded.

    Example: `Lesson.of(settings.update.teachers, data, model="Qwen/Qwen3-0.6B").of_domain["math"]`
    """

    teachers: Mapping[str, TeacherSettings]
    """By name, those that teach a domain."""
    weights: Mapping[str, TeacherWeights]
    of_domain: Mapping[str, str]
    """The teacher's name, for domains that have one."""
    data: DomainData
    model: Any
    """What the policy is made of: a model, or its name."""

    @classmethod
    def of(cls, teachers: Mapping[str, TeacherSettings], data: DomainData, *, model: Any) -> Lesson:
        """Find weights, compare vocabularies, fill every training row into its teacher's context. Raises ValueError."""
        of_domain = {domain.name: domain.teacher for domain in data.domains if domain.teacher is not None}
        named = {name: teachers[name] for name in sorted(set(of_domain.values()))}
        base = model if isinstance(model, str) else model.name_or_path
        weights = {name: TeacherWeights.of(name, teacher, base=base) for name, teacher in named.items()}
        for name, found in weights.items():
            check_vocabulary(name, found, data.tokenizer)
        lesson = cls(teachers=named, weights=weights, of_domain=of_domain, data=data, model=model)
        for domain in data.domains:
            if domain.name in of_domain:
                lesson._check_room(domain)
        return lesson

    def read(self, prompts: Sequence[Prompt]) -> list[Sequence[int]]:
        """Return the token ids of prompts as their domains' teachers read them."""
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: Prompt) -> Sequence[int]:
        context = self.teachers[self.of_domain[prompt.domain]].context
        return prompt.ids if context is None else self.data.tokenized([in_context(context, prompt)])[0].ids

    def _check_room(self, domain: Domain) -> None:
        """Raise ValueError for a row that does not fit into its teacher's template or memory."""
        name = self.of_domain[domain.name]
        context, weights = self.teachers[name].context, self.weights[name]
        room = context_of(weights.path) if weights.kind == "checkpoint" else self.data.context
        if context is None and weights.kind != "checkpoint":
            return
        table, limit = self.data.train[domain.name], self.data.limits[domain.name]
        for prompt in table:
            asked = prompt if context is None else in_context(context, prompt)
            if room is not None and (n := len(self.data.tokenized([asked])[0].ids)) + limit > room:
                raise ValueError(
                    f"teachers.{name}: {table.row_of(prompt.id)}: {n} tokens to read and {limit} to score, "
                    f"its context holds {room}"
                )


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

    def logps(self, completions: Sequence[Completion]) -> list[torch.Tensor | None]:
        """Return, for each completion of this rank, its teacher's log-probability of each token [T]; None without one."""
        found: list[torch.Tensor | None] = [None] * len(completions)
        of = [self.lesson.of_domain.get(completion.prompt.domain) for completion in completions]
        for name in self.lesson.teachers:
            places = [i for i, teacher in enumerate(of) if teacher == name]
            most = max(gather_object([len(places)]))
            if not most:
                continue
            prompts = self.lesson.read([completions[i].prompt for i in places])
            rows = [(list(ids), list(completions[i].ids)) for ids, i in zip(prompts, places, strict=True)]
            # a rank with fewer rows runs its own first one again, which nobody reads
            spare = rows[0] if rows else (list(completions[0].prompt.ids), list(completions[0].ids))
            scored = self._score(name, rows + [spare] * (most - len(rows)))
            for i, logps in zip(places, scored[: len(places)], strict=True):
                found[i] = logps
        return found

    def _score(self, name: str, rows: Sequence[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
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
        if trainer.is_fsdp_enabled:
            return prepare_fsdp(model, trainer.accelerator)
        return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def _inner(model: Any) -> Any:
    """Return what DeepSpeed has wrapped."""
    return getattr(model, "module", model)
