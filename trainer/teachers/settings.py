"""What a recipe says of teachers and of distillation, and what excludes it. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from polyphony.curricula.declarations import nearest, settings
from polyphony.curricula.prompts.pool import PoolSettings
from polyphony.curricula.records import Domain
from polyphony.trainer.teachers.context import fields_of

CURRENT, START = "self", "self@start"
"""Weights that are the policy's own: as they are now, and as they were before the first step."""


@settings
class TeacherSettings:
    """A teacher: weights, and a context that only it reads.

    Example: `TeacherSettings(model="self", context="{prompt} The answer is {answer}.")`
    """

    model: str | None = None
    """A checkpoint's folder, a run's for its `final/`, or a name on the hub, with the policy's vocabulary; the folder of an
    adapter of the recipe's model; `self`: the policy as it is at each draw; `self@start`: as it was before the first step,
    frozen (with `lora`, the base without the adapter). A relative folder is looked for beside the recipe first. With
    `endpoint`, the name by which it is served there; null: the only one."""
    endpoint: str | None = None
    """Address, up to and with `/v1`, of a server that scores token ids as vLLM's does (`prompt_logprobs`) and has the
    policy's vocabulary. The run samples at temperature 1, nothing cut off."""
    client: Mapping[str, Any] = Field(default_factory=dict)
    """How the endpoint is asked, as a judge's is: `api_key_env`, `concurrency`, `requests_per_minute`, `patience_s`,
    `timeout_s`."""
    context: str | None = None
    """What the teacher reads where the policy reads the prompt's last message: text with fields of the row in braces,
    `{answer}`, and `{prompt}` for that message, which else comes after the text. Of the very completion that it scores:
    `{attempt}`, its text; `{reward}`; `{feedback}`, what the domain's reward told of it by `log_extra("feedback", ..)`, else
    the reward in words. Null: it reads what the policy does."""

    @field_validator("model")
    @classmethod
    def _is_a_name(cls, model: str | None) -> str | None:
        if model is not None and (not model.strip() or not model.isprintable()):
            raise ValueError("expected a folder, a name on the Hugging Face hub, self or self@start")
        return model

    @field_validator("context")
    @classmethod
    def _can_be_filled_in(cls, context: str | None) -> str | None:
        if context is not None:
            fields_of(context)
        return context


@settings
class DistilSettings:
    """On-policy distillation (`algorithm: distil`): the advantage of a token is log pi_teacher - log pi_policy."""

    others: Literal["grpo", "skip"] = "grpo"
    """What is learned in trained domains without a teacher: what `algorithm: grpo` would, or nothing."""
    clip: float = Field(default=5.0, gt=0)
    """Largest advantage of a token, up and down, in nats; 5 as in MOPD (arXiv:2606.30406)."""
    reward_weight: float = Field(default=0.0, ge=0)
    """How much of the reward's advantage is added to the teacher's in domains that have one; rewards are scored and logged
    in any case. Needs `grpo.num_generations` of at least 2."""
    max_missing: float = Field(default=0.1, ge=0, le=1)
    """Largest share of a domain's last 256 completions on which its teacher's log-probabilities may be no numbers; such a
    completion has no advantage and is counted. Past it the run stops, though not before 64."""


UNBALANCED = {
    "vespo": "weighs whole completions by the sign of one advantage",
    "bnpo": "averages over the tokens of a micro-batch, so that no factor balances domains of long and short answers",
}
"""Losses that take no advantage a token, or not one whose domains can be balanced, and why."""

AGAINST_TOKENS = {
    "off_policy_mask_threshold": "it drops whole completions by the sign of one advantage",
    "cast_lm_head_to_fp32": "teachers compute in their own precision",
    "importance_sampling_level": "one ratio a completion gives all its tokens the mean of their advantages",
}
"""Fields of TRL's that a teacher's advantages a token exclude, and why."""


def check_teachers(
    teachers: Mapping[str, TeacherSettings],
    distil: DistilSettings | None,
    domains: Sequence[Domain],
    of_trl: Callable[[str], Any],
    *,
    pool: PoolSettings | None,
) -> None:
    """Raise ValueError for what contradicts; `distil` is None under another algorithm."""
    taught = {domain.name: domain.teacher for domain in domains if domain.teacher is not None}
    is_single = of_trl("num_generations") == 1
    if distil is None:
        if teachers or taught:
            key = "teachers" if teachers else f"domains.{next(iter(taught))}.teacher"
            raise ValueError(f"{key}: teachers are for algorithm: distil; say it, or leave them out")
        if is_single:
            raise ValueError(
                "grpo.num_generations=1 is for algorithm: distil; a group of one has no advantage: at least 2"
            )
        return
    if not taught:
        raise ValueError("algorithm: distil needs a teacher: teachers.<name>, and domains.<name>.teacher")
    for name, teacher in teachers.items():
        _check_source(name, teacher, of_trl)
    for domain in domains:
        if domain.teacher is not None:
            _check_pupil(domain, teachers)
    alone = [domain.name for domain in domains if not domain.is_watch_only and domain.teacher is None]
    if is_single and distil.reward_weight:
        raise ValueError(
            f"distil.reward_weight={distil.reward_weight:g} with grpo.num_generations=1: a group of one has no advantage "
            "by its rewards; give at least 2, or leave the weight out"
        )
    if is_single and alone and distil.others == "grpo":
        raise ValueError(
            f"domain {alone[0]!r} has no teacher, and a group of one (grpo.num_generations=1) teaches nothing by its "
            "rewards: give it a teacher, or distil.others: skip"
        )
    if not alone and pool is not None and pool.when_exhausted == "stop":
        raise ValueError(
            "pool.when_exhausted=stop, and every trained domain has a teacher, which teaches as much of prompts that are "
            "always right, or never: leave it out"
        )
    if alone and distil.others == "skip" and pool is not None and pool.refill.max_rounds:
        raise ValueError(
            f"pool.refill would replace every group of domain {alone[0]!r}, which distil.others: skip leaves out: set "
            "pool.refill.max_rounds=0"
        )
    _check_loss(of_trl)


WHOLE = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
"""How a run samples whose teacher is behind an endpoint: log-probabilities come from there as the model has them."""
OFF = {"top_k": -1}
"""Other ways to say so."""


def _check_source(name: str, teacher: TeacherSettings, of_trl: Callable[[str], Any]) -> None:
    where = f"teachers.{name}"
    if teacher.model is None and teacher.endpoint is None:
        raise ValueError(f"{where}: needs weights: model, or endpoint")
    if teacher.endpoint is None:
        if teacher.client:
            raise ValueError(f"{where}.client: it is for a teacher behind an endpoint; leave it out")
        return
    if teacher.model in (CURRENT, START):
        raise ValueError(f"{where}: model {teacher.model} and an endpoint exclude each other; leave out one")
    kwargs = of_trl("generation_kwargs")
    more = kwargs if isinstance(kwargs, Mapping) else {}
    given = {field: of_trl(field) for field in WHOLE}
    given |= {f"generation_kwargs.{field}": more.get(field) for field in WHOLE}
    for key, value in given.items():
        field = key.rpartition(".")[2]
        if value not in (None, WHOLE[field], OFF.get(field)):
            raise ValueError(
                f"grpo.{key}={value} with {where}.endpoint: a server tells log-probabilities at temperature 1, nothing "
                f"cut off; sample so ({field} {WHOLE[field]}), or load the teacher here (model)"
            )


def _check_pupil(domain: Domain, teachers: Mapping[str, TeacherSettings]) -> None:
    key = f"domains.{domain.name}.teacher"
    if domain.is_watch_only:
        raise ValueError(f"{key}: a watched domain is not trained: leave it out")
    if domain.teacher not in teachers:
        raise ValueError(f"{key}: unknown teacher {domain.teacher!r}; {nearest(str(domain.teacher), list(teachers))}")


def _check_loss(of_trl: Callable[[str], Any]) -> None:
    loss = of_trl("loss_type")
    if loss in UNBALANCED:
        raise ValueError(f"grpo.loss_type={loss} with algorithm: distil: it {UNBALANCED[loss]}; grpo and dapo can")
    for said, why in against_tokens(of_trl):
        raise ValueError(f"{said} with algorithm: distil: {why}; leave it out")


def against_tokens(of_trl: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Yield what is said of TRL's fields that advantages a token exclude, each with why."""
    for name, why in AGAINST_TOKENS.items():
        if (value := of_trl(name)) and value != "token":
            yield f"grpo.{name}={value}", why
