"""Who teaches which domain: found and checked before weights are loaded, and what each teacher reads of a completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polyphony.curricula.records import Completion, Domain
from polyphony.trainer.domains import DomainData, context_of
from polyphony.trainer.run.origins import origin_of
from polyphony.trainer.teachers.context import ATTEMPT, fields_of, in_context
from polyphony.trainer.teachers.endpoint import TeacherEndpoint
from polyphony.trainer.teachers.settings import TeacherSettings
from polyphony.trainer.teachers.weights import TeacherWeights, check_vocabulary

TRIED = 64
"""Tokens of a row by which an endpoint is tried, and known again."""


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
    endpoints: Mapping[str, TeacherEndpoint] = field(default_factory=dict)
    """By teacher, those that were asked."""
    rooms: Mapping[str, int | None] = field(default_factory=dict)
    """By teacher, the tokens that its context holds; None where it does not say."""
    said: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By teacher behind an endpoint, the log-probabilities of a first training row's beginning."""

    @classmethod
    def of(
        cls,
        teachers: Mapping[str, TeacherSettings],
        data: DomainData,
        *,
        model: Any,
        offline: bool = False,
        trusts_code: bool = False,
    ) -> Lesson:
        """Find weights, compare vocabularies, fill every training row into its teacher's context. Raises ValueError.

        Endpoints are asked, but for `offline`. `trusts_code`: code that comes with a teacher's files may be run.
        """
        of_domain = {domain.name: domain.teacher for domain in data.domains if domain.teacher is not None}
        named = {name: teachers[name] for name in sorted(set(of_domain.values()))}
        base = model if isinstance(model, str) else model.name_or_path
        weights = {name: TeacherWeights.of(name, teacher, base=base) for name, teacher in named.items()}
        for name, found in weights.items():
            check_vocabulary(name, found, data.tokenizer, trusts_code=trusts_code)
        remote = {} if offline else {name: named[name] for name, found in weights.items() if found.kind == "endpoint"}
        there = {name: TeacherEndpoint.of(name, teacher).found(data.tokenizer) for name, teacher in remote.items()}
        rooms = dict.fromkeys(named, data.context) | {name: there[name].room for name in there}
        rooms |= {name: None for name, found in weights.items() if found.kind == "endpoint" and offline}
        rooms |= {
            name: context_of(found.path, trust_remote_code=trusts_code)
            for name, found in weights.items()
            if found.kind == "checkpoint"
        }
        made = {"teachers": named, "weights": weights, "of_domain": of_domain, "data": data, "model": model}
        lesson = cls(**made, endpoints=there, rooms=rooms)
        for domain in data.domains:
            if domain.name in of_domain:
                lesson._check_room(domain)
        return replace(lesson, said={name: lesson._tried(name) for name in there})

    def read(self, completions: Sequence[Completion]) -> list[Sequence[int] | None]:
        """Return the token ids of the completions' prompts as their teachers read them; None where there is no room for
        them and the completion, as what is told of an attempt may be of any length."""
        return [self._read(completion) for completion in completions]

    def _read(self, completion: Completion) -> Sequence[int] | None:
        prompt = completion.prompt
        name = self.of_domain[prompt.domain]
        if (context := self.teachers[name].context) is None:
            return prompt.ids
        ids, room = self.data.tokenized([in_context(context, prompt, completion)])[0].ids, self.rooms.get(name)
        return None if room is not None and len(ids) + len(completion.ids) > room else ids

    def _tried(self, name: str) -> tuple[float, ...]:
        domain = next(domain for domain, teacher in self.of_domain.items() if teacher == name)
        (first,) = self.data.tokenized([next(iter(self.data.train[domain]))])
        ids = self._read(Completion(ids=(), prompt=first)) or ()
        end: Any = self.data.tokenizer.eos_token_id
        return self.endpoints[name].tried([*ids[:TRIED], end])

    @property
    def origins(self) -> dict[str, dict[str, Any]]:
        """By teacher, where what it says comes from, for provenance; those that are the policy's own weights apart."""
        found = {n: origin_of(w.path) for n, w in self.weights.items() if w.kind in ("adapter", "checkpoint")}
        there = {
            name: {"name": self.endpoints[name].model, "says": [round(value, 4) for value in said]}
            for name, said in self.said.items()
        }
        return {**found, **there}

    def _check_room(self, domain: Domain) -> None:
        """Raise ValueError for a row that does not fit into its teacher's template or memory."""
        name = self.of_domain[domain.name]
        context, kind, room = self.teachers[name].context, self.weights[name].kind, self.rooms.get(name)
        if context is None and kind not in ("checkpoint", "endpoint"):
            return
        table, limit = self.data.train[domain.name], self.data.limits[domain.name]
        if context is not None and ATTEMPT in fields_of(context):
            limit *= 2  # read, and scored
        for prompt in table:
            asked = prompt if context is None else in_context(context, prompt)
            if room is not None and (n := len(self.data.tokenized([asked])[0].ids)) + limit > room:
                raise ValueError(
                    f"teachers.{name}: {table.row_of(prompt.id)}: {n} tokens to read and {limit} to score, "
                    f"its context holds {room}"
                )
