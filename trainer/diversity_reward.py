"""Diversity reward: quality and difference fused, in domains with `domains.<d>.diversity`.

A group's `rewards` stay its quality, which pass rates and the curriculum use; advantages are computed from the fused
reward. Groups may straddle ranks, so they are compared after the gather, each by one rank for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from polyphony.curricula.declarations import as_settings
from polyphony.curricula.records import Compared, Domain, Group
from polyphony.rewards.partitions import Same
from polyphony.rewards.registry import GraderGoneError
from polyphony.trainer.ranks import gather_object
from polyphony.trainer.scoring import is_unreachable, together
from polyphony.trainer.settings import Diversity

logger = logging.getLogger(__name__)

_TRIAL = ("a fox ran", "an owl slept")


def find_diversity(domain: Domain) -> Diversity | None:
    """Return how a domain rewards difference; None where it does not. Raises ValueError naming the domain."""
    spec = domain.diversity
    try:
        if spec is None:
            return None
        diversity = as_settings(Diversity, spec)
        if domain.kind == "structured":
            diversity.check_verifiable()
        if diversity.compare == "transcripts" and not domain.acts:
            raise ValueError("compare: transcripts: the domain does not act, so that its answers are all that is said")
        return replace(diversity, partitioner=diversity.found)  # found once: it may hold a model
    except (ValueError, TypeError) as error:
        raise ValueError(f"domains.{domain.name}.diversity: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Fusion:
    """Fuse the groups of the domains that reward difference; leave all others as they are.

    Example: `Fusion.of([writing])(groups, lambda group: "tell a story")[0].fused.classes`
    """

    by_domain: Mapping[str, Diversity] = field(default_factory=dict)
    gather: Callable[[list], list] = list
    """Joins the lists of all ranks in rank order."""
    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, domains: Sequence[Domain]) -> Fusion:
        """Find the partitioners and try each on two texts, so that one that cannot work fails before the run does."""
        found = {d.name: diversity for d in domains if (diversity := find_diversity(d)) is not None}
        for name, diversity in found.items():
            try:
                diversity.found.same([_TRIAL], ["tell me something"])
            except Exception as error:  # a partitioner may be a user's
                what = f"{type(error).__name__}: {error}"
                raise ValueError(f"domains.{name}.diversity: the partitioner failed on a trial: {what}") from error
        return cls(by_domain=found)

    def on(self, accelerator: Any) -> Fusion:
        """Return the same for a run of several ranks."""
        rank, world_size = accelerator.process_index, accelerator.num_processes
        return replace(self, gather=gather_object, rank=rank, world_size=world_size)

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains whose texts have to be gathered."""
        return tuple(self.by_domain)

    def compares(self, others: Sequence[str]) -> Mapping[str, Compared]:
        """Return what is compared in each domain whose texts have to be gathered: its own, and `others`' answers."""
        own: dict[str, Compared] = {name: of.compare for name, of in self.by_domain.items()}
        return {**dict.fromkeys(others, "answers"), **own}

    @property
    def slow(self) -> frozenset[str]:
        """Domains whose partitioners ask somebody who may be gone."""
        return frozenset(n for n, diversity in self.by_domain.items() if getattr(diversity.found, "is_slow", False))

    def __call__(self, groups: Sequence[Group], prompt_of: Callable[[Group], Any]) -> list[Group]:
        """Return the groups with `fused` filled in, where their domain rewards difference; these have their texts.

        Collective: all ranks hand over the same groups, each compares every `world_size`-th of those concerned, so that
        no group is judged twice, and all fuse the same verdicts.
        """
        places = [i for i, group in enumerate(groups) if group.domain in self.by_domain]
        if not places:
            return list(groups)
        mine = {i: _texts(groups[i]) for i in places[self.rank :: self.world_size]}

        def tell() -> list[tuple[int, Same | None]]:
            told = []
            for name, diversity in self.by_domain.items():
                own = [i for i in mine if groups[i].domain == name]
                prompts = [prompt_of(groups[i]) for i in own]
                told += zip(own, compared(name, diversity, [mine[i] for i in own], prompts), strict=True)
            return told

        matrices = dict(self.gather(together(tell, self.slow, self.gather)))
        return [
            self._fused(group, matrices[i]) if group.domain in self.by_domain else group
            for i, group in enumerate(groups)
        ]

    def _fused(self, group: Group, same: Same | None) -> Group:
        try:
            fused = self.by_domain[group.domain].fused(same, group.rewards)
        except ValueError as error:
            raise ValueError(f"domain {group.domain!r}: {error}") from error
        return replace(group, fused=fused)


def compared(
    name: str, diversity: Diversity, texts: Sequence[Sequence[str]], prompts: Sequence[Any]
) -> list[Same | None]:
    """Return which texts of each group say the same; None where the partitioner could not tell, or raised.

    Retried group by group, so that one group costs one group; not where its judge cannot be reached. Raises ValueError
    for an answer of the wrong size, and GraderGoneError.
    """
    if not texts:
        return []
    try:
        told = diversity.found.same(texts, prompts)
    except GraderGoneError:
        raise
    except Exception as error:  # a user's partitioner may raise anything
        if len(texts) == 1 or is_unreachable(error):
            logger.warning("domain %r: the partitioner raised %s: %s", name, type(error).__name__, error)
            return [None] * len(texts)
        return [compared(name, diversity, [t], [p])[0] for t, p in zip(texts, prompts, strict=True)]
    sizes = [len(text) for text in texts]
    if len(told) != len(texts) or sizes != [
        n if same is None else len(same) for same, n in zip(told, sizes, strict=True)
    ]:
        raise ValueError(f"domain {name!r}: the partitioner did not return one matrix [n][n] for each of its groups")
    return told


def _texts(group: Group) -> list[str]:
    if len(group.texts) != len(group.rewards):
        raise ValueError(
            f"domain {group.domain!r}: {len(group.texts)} of {len(group.rewards)} texts of a group were gathered"
        )
    return list(group.texts)
