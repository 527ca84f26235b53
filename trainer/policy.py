"""The policy as all other code uses it: sampling, weight sync with its engine and the check of it, forward passes.

TRL's trainer holds the weights and asks `vllm_generation` for completions once `use_vllm` is set, which also switches its
importance correction on. Forward passes are TRL's own, so that temperature, precision and the fused head are those of the
update; collective where the policy is split over ranks. B rows, P prompt tokens, T completion tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import pad

from polyphony.curricula.records import UNNAMED, Completion, Prompt
from polyphony.trainer.domains import DomainData
from polyphony.trainer.engine.engine import Engine, EngineFactory, find_engine
from polyphony.trainer.engine.merge import merged_parameters
from polyphony.trainer.engine.turns import Turns
from polyphony.trainer.engine.vllm import OnFinished, Request, Sampling
from polyphony.trainer.engine.weight_check import WeightCheck, check_weights, tolerance_of
from polyphony.trainer.ranks import gather_object
from polyphony.trainer.run import say

Rows = Sequence[Sequence[int]]
"""Token ids, ragged."""

COARSE_STEP = 1e-4
CHECKED_TOKENS = 8
"""Of each prompt in the check of weights."""


class InFlight(Protocol):
    """What samples draws ahead in a thread of its own."""

    def is_asking(self) -> bool:
        """Return whether the caller is one of them; raises where it is no longer wanted."""
        ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until none is sampled; return whether that came in time."""
        ...

    def drop(self) -> None:
        """Forget what was sampled: the weights are others now."""
        ...


class Policy:
    """The weights that TRL's trainer trains, and the engine that samples from them.

    Example: `trainer.policy.complete([Request(prompt_ids=[5, 9], seed=1, max_tokens=8)], 1)[0].ids`
    """

    engine: Engine | None = None
    """What samples; None where TRL itself generates. Set by `attach`."""
    ahead: InFlight | None = None
    """Draws that are sampled while the policy is trained; None where it waits for them."""

    def __init__(
        self,
        trainer: GRPOTrainer,
        data: DomainData,
        *,
        passes: Callable[..., tuple],
        turn: Callable[..., tuple[list, list | None]],
    ) -> None:
        """`passes` and `turn` are TRL's `_get_per_token_logps_and_entropies` and `_generate_single_turn`."""
        self.trainer: Any = trainer  # TRL declares many of its attributes wider than they are once it is constructed
        self.data = data
        self.rank: int = self.trainer.accelerator.process_index
        self.world_size: int = self.trainer.accelerator.num_processes
        self.group_size: int = self.trainer.num_generations
        """Completions a prompt; a group may straddle ranks."""
        self._passes, self._turn = passes, turn
        self._silent = data.framing.union(self.trainer.eos_token_ids)
        self.ends = frozenset({*self.trainer.eos_token_ids, self.trainer._tokenizer.pad_token_id})
        """Tokens that end a turn; a completion that has none at its end was cut off."""
        self._allowed: float | None = None
        self._has_dropout = has_dropout(self.trainer.model)
        if self._has_dropout:
            warnings.warn(
                "the model has dropout: what is updated is not quite what was sampled from, and a weight sync that breaks "
                "during the run is not told from it; set disable_dropout, or the shares to 0 in the model's config",
                stacklevel=3,
            )

    @property
    def next_step(self) -> int:
        """The optimizer step that what is sampled now is for, from 1."""
        return self.trainer.state.global_step + 1

    @property
    def sampling(self) -> Sampling:
        """How completions are sampled in this run."""
        t = self.trainer
        return Sampling(
            temperature=t.temperature,
            top_p=t.top_p,
            top_k=t.top_k,
            min_p=t.min_p,
            repetition_penalty=t.repetition_penalty,
            structured_outputs_regex=t.args.vllm_structured_outputs_regex,
            generation_kwargs=t.args.generation_kwargs or {},
        )

    @property
    def precision(self) -> torch.dtype:
        """What the policy computes in: mixed precision if asked for, else the type of its weights."""
        args = self.trainer.args
        if args.bf16 or args.fp16:
            return torch.bfloat16 if args.bf16 else torch.float16
        return self.trainer.model.dtype

    # --- the engine -----------------------------------------------------------------------------------------------

    def attach(self, engine: str | Engine | EngineFactory) -> None:
        """Take an engine, or make the one that is named; none for `transformers`, with which TRL itself generates.

        Raises ValueError for a name that does not exist, and for what makes no engine.
        """
        if engine == "transformers":
            return
        trainer, args = self.trainer, self.trainer.args
        if isinstance(engine, Engine):
            engine.attach(trainer.model, trainer.accelerator)
            engine.sampling = self.sampling  # of the run before, until now
        else:
            make = find_engine(engine) if isinstance(engine, str) else engine
            if engine == "vllm" and trainer.accelerator.is_main_process:
                say("the policy is loaded; starting vLLM")  # which takes its time, without a word
            engine = make(
                trainer.model,
                trainer.accelerator,
                trainer.processing_class,
                sampling=self.sampling,
                max_model_length=args.vllm_max_model_length,
                max_num_seqs=args.per_device_train_batch_size * args.steps_per_generation,
                dtype=str(self.precision).removeprefix("torch."),
                longest=self.data.longest,
                gpu_memory_utilization=args.vllm_gpu_memory_utilization,
                enable_sleep_mode=args.vllm_enable_sleep_mode,
                model_impl=args.vllm_model_impl,
                trust_remote_code=args.trust_remote_code,
            )
        if not isinstance(engine, Engine):
            raise ValueError(f"engine: {make!r:.60} returned {engine!r:.60}, which is no Engine")
        engine.max_completion_length = trainer.max_completion_length
        self.engine = trainer.vllm_generation = engine
        trainer.use_vllm, trainer._last_loaded_step = True, -1
        set_seed(args.seed, device_specific=True)  # starting vLLM reseeds the process's generators

    def keep_base(self) -> None:
        """Have TRL's own engine, too, be sent merged copies of an adapter's base, not the base written and restored."""
        trainer = self.trainer
        if isinstance(trainer.model, PeftModel):
            walk = partial(merged_parameters, trainer.model, trainer.accelerator)
            trainer.vllm_generation._iter_named_params = walk

    def sync(self) -> None:
        """Load the policy's present weights into the engine, whatever was loaded before."""
        self.wait_for_engine()
        if self.trainer.use_vllm:
            self.trainer.vllm_generation.sync_weights()
            self.trainer._last_loaded_step = self.trainer.state.global_step

    def rest(self) -> None:
        """Let the engine give back what it only needs to sample."""
        if self.engine is not None:
            self.engine.rest()

    def complete(
        self, requests: Sequence[Request], copies: int, on_finished: OnFinished | None = None
    ) -> list[Completion]:
        """Sample one completion a request with the policy's present weights.

        Without an engine of ours, TRL generates (transformers, or its own colocate and server modes): seeds are then not
        honoured, and lengths by cutting, which leaves the distribution of what is kept as it is. `copies` is how often
        each prompt stands in a row; `on_finished` gets each completion when it is whole, from an engine of ours.
        """
        if self.engine is not None:  # also without a request: syncs, and some engines, need every rank
            self.sync_if_older()
            return self.engine.complete(requests, on_finished)
        if not requests:  # a rank without a row in this round; by `joint` none waits for it
            return []
        if any(r.is_greedy for r in requests):
            raise ValueError("greedy decoding needs an engine of ours: TRL's own generation samples every completion")
        ids, logps = self._turn([list(r.prompt_ids) for r in requests], None, {}, copies)
        return [
            Completion(ids=i[: r.max_tokens], logps=None if p is None else p[: r.max_tokens])
            for r, i, p in zip(requests, ids, logps or [None] * len(ids), strict=True)
        ]

    def converse(self, turns: Turns) -> None:
        """Sample all turns with the policy's present weights; where TRL generates, in batches of those that are ready."""
        if self.engine is not None:
            self.sync_if_older()
            self.engine.converse(turns)
            return
        while asked := turns.waiting("all"):
            for (place, _), completion in zip(asked, self.complete([r for _, r in asked], 1), strict=True):
                turns.take(place, completion)

    def sync_if_older(self) -> None:
        """Have the engine hold the policy's present weights; not where a draw is sampled ahead, with those of before."""
        if not self.wait_for_engine():
            return
        assert self.engine is not None
        if self.trainer.state.global_step != self.trainer._last_loaded_step or self.engine.is_asleep:
            self.sync()

    def wait_for_engine(self) -> bool:
        """Wait until no draw is sampled ahead; False, at once, for such a draw itself."""
        if self.ahead is None:
            return True
        if self.ahead.is_asking():
            return False
        return self.ahead.wait()

    def close(self) -> None:
        """Let go of what the engine holds outside this process."""
        if self.engine is not None:
            self.engine.close()

    @property
    def rank_rows(self) -> int:
        """Rows of a draw that each of several ranks has; 0 where there is one rank."""
        args = self.trainer.args
        return args.per_device_train_batch_size * args.steps_per_generation if self.world_size > 1 else 0

    @property
    def joint(self) -> str:
        """In words, what makes ranks generate together, so that all have to ask for as much; empty where nothing does.

        TRL cuts the joint answer of one engine into equal parts, and waits for a rank that asks for nothing. Where
        Transformers generates and the policy's weights are split over the ranks, every token is made by all of them.
        """
        trainer = self.trainer
        if self.engine is not None or self.world_size == 1:
            return ""
        if trainer.use_vllm:
            is_one = trainer.vllm_mode == "server" or trainer.args.vllm_tensor_parallel_size > 1
            return "several ranks on one engine of TRL's (use_vllm)" if is_one else ""
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        is_zero3 = trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3
        split = "over ranks that split the policy's weights (zero3 or fsdp)"
        return f"engine transformers {split}" if trainer.is_fsdp_enabled or is_zero3 else ""

    @property
    def is_shared(self) -> bool:
        """Whether there are several ranks that sample together with one engine of ours."""
        return self.engine is not None and self.engine.is_shared and self.world_size > 1

    @property
    def room(self) -> int | None:
        """Tokens that the engine has room for in one sequence; None where it does not say."""
        return None if self.engine is None else self.engine.room

    # --- what token ids say -----------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Return what was said: tokens marked special too, but for those that only frame it."""
        return self.trainer.processing_class.decode([i for i in ids if i not in self._silent])

    def read(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Completion]:
        """Return the completions with prompt and text; one without an end-of-sequence token was cut off."""
        return [
            c  # an episode knows what it began with, and what of it is an answer
            if c.episode is not None
            else replace(
                c,
                prompt=prompt if c.prompt == UNNAMED else c.prompt,  # a script's function says what it asked with
                text=self.decode(c.ids),
                truncated=c.ids[-1] not in self.ends,
            )
            for prompt, c in zip(prompts, completions, strict=True)
        ]

    # --- does the engine follow the policy? ---------------------------------------------------------------------------

    @property
    def _tolerance(self) -> float:
        """How far engine and policy may be apart in the mean log-probability of a token, at temperatures of 1 and above."""
        if self._allowed is None:
            self._allowed = tolerance_of(self.precision, device=self.trainer.accelerator.device.type)
        return self._allowed

    @property
    def _coldness(self) -> float:
        """What logits, and their differences, are divided by, where that makes them larger."""
        return min(1.0, self.trainer.temperature)

    def check(self) -> WeightCheck | None:
        """Check, on a few held-out prompts, that the engine follows the policy's weights; the next draw syncs again.

        None without an engine that keeps weights of its own.
        """
        if not self.trainer.use_vllm:
            return None
        tables = (self.data.heldout or self.data.train).values()
        prompts = self.data.tokenized(prompt for table in tables for prompt in islice(table, 2))
        ids = [prompt.ids for prompt in prompts]
        requests = [
            Request(prompt_ids=prompt.ids, seed=n, max_tokens=min(CHECKED_TOKENS, self.data.limits[prompt.domain]))
            for n, prompt in enumerate(prompts)
        ]
        with self._whole_distribution():
            check = check_weights(
                model=self.trainer.model,
                sync=self.sync,
                sample=lambda: self.complete(requests, 1),
                score=lambda completions: self.token_logps(ids, [c.ids for c in completions]),
                tolerance=self._tolerance,
                coldness=self._coldness,
                is_adapter=self.sends_adapter,
            )
        self.trainer._last_loaded_step = -1
        return replace(check, note=self._said_of_adapter)

    @property
    def sends_adapter(self) -> bool:
        """Whether the engine is sent the adapter by itself, not weights with it merged in."""
        return self.engine is not None and self.engine.adapter is not None

    @property
    def _said_of_adapter(self) -> str:
        if self.sends_adapter:
            return "the adapter alone is sent; its base was sent once, and what follows of it later is not checked"
        why = self.engine.merged_because if self.engine is not None else ""
        return f"the adapter is merged into a copy of the base at each sync: {why}" if why else ""

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Have the engine sample from what `final/` is, the base with the adapter merged in, for a while."""
        assert self.engine is not None
        with self.engine.merged():
            self.sync()
            yield
        self.trainer._last_loaded_step = -1

    @contextmanager
    def _whole_distribution(self) -> Iterator[None]:
        """Sample without top-k and its like for a while: what they leave out, the policy's log-probabilities do not know."""
        whole = Sampling(temperature=self.trainer.temperature)
        generation = self.trainer.vllm_generation
        changed = asdict(whole) if self.engine is None else {"sampling": whole}  # TRL's own modes name each by itself
        kept = {name: getattr(generation, name) for name in changed}
        for name, value in changed.items():
            setattr(generation, name, value)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(generation, name, value)

    def check_agreement(self, completions: Sequence[Completion]) -> None:
        """Raise RuntimeError where engine and policy no longer agree on what was sampled: a broken weight sync.

        Completions of older weights, which the recipe may allow, differ by right; importance correction is there for them.
        So do those that were sampled with top-k and its like, and TRL's log-probabilities of a model with dropout. With
        `rollouts.ahead` all that is trained on is of older weights, so held-out completions are looked at (`entropy_sums`).
        """
        if self._tells_agreement and self.ahead is None and not self._is_stale(completions):
            differences = self.trainer._metrics["train"].get("sampling/sampling_logp_difference/mean")
            self._check_difference(differences[-1] if differences else 0.0)

    @property
    def _tells_agreement(self) -> bool:
        """Whether the engine's log-probabilities of what it samples are to be the policy's."""
        return self.sampling == Sampling(temperature=self.trainer.temperature) and not self._has_dropout

    def _check_difference(self, difference: float) -> None:
        allowed = self._tolerance / self._coldness
        if difference > allowed:
            raise RuntimeError(
                f"engine and policy differ by {difference:.2g} in the mean log-probability of sampled tokens (allowed "
                f"{allowed:g}): the engine does not hold the policy's weights"
            )

    def _is_stale(self, completions: Sequence[Completion]) -> bool:
        """True where a completion of any rank came from an older weight version than the engine's."""
        if self.engine is None:
            return False
        versions = [c.version for c in completions if c.version is not None]
        return min(gather_object(versions), default=self.engine.version) < self.engine.version

    @property
    def loses_small_steps(self) -> bool:
        """Whether the optimizer adds steps to weights of half precision that are as coarse as they.

        DeepSpeed and FSDP keep float32 weights for the optimizer. Adam moves a weight by about the learning rate; bfloat16
        numbers of size w are w / 128 to w / 256 apart, so that a step below 1e-4 is rounded away in a weight of 0.05.
        """
        trainer = self.trainer
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or trainer.args.learning_rate >= COARSE_STEP:
            return False
        return any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in trainer.model.parameters())

    # --- forward passes over completions that are not trained on, no gradient -------------------------------------------

    def forward(self, prompt_ids: Rows, completion_ids: Rows, *, model: Any = None) -> tuple[torch.Tensor, ...]:
        """Return log-probabilities, entropies (nats) and mask of completions, each [B, T], under the policy or `model`."""
        trainer = self.trainer
        padding, device = trainer._tokenizer.pad_token_id, trainer.accelerator.device
        ids, attention, mask = pad_rows(prompt_ids, completion_ids, padding=padding, device=device)
        size = trainer.args.per_device_eval_batch_size
        model = trainer.model if model is None else model
        with torch.no_grad(), _without_dropout(model):
            logps, entropy, _ = self._passes(model, ids, attention, mask.size(1), size, compute_entropy=True)
        return logps, entropy, mask

    def token_scores(self, prompt_ids: Rows, completion_ids: Rows, *, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probabilities and mask of completions, each [B, T], under `model`, in one micro-batch."""
        trainer = self.trainer
        padding, device = trainer._tokenizer.pad_token_id, trainer.accelerator.device
        ids, attention, mask = pad_rows(prompt_ids, completion_ids, padding=padding, device=device)
        with torch.no_grad():
            logps, _, _ = self._passes(model, ids, attention, mask.size(1), len(prompt_ids))
        return logps, mask

    def entropy_sums(self, completions: Sequence[Completion]) -> list[tuple[float, int]]:
        """Return summed token entropy (nats) and token count of each completion."""
        logps, entropy, mask = self.forward([c.prompt.ids for c in completions], [c.ids for c in completions])
        mask = mask * own_tokens(completions, mask)
        told = [c.logps for c in completions if c.logps is not None]
        if self.ahead is not None and self._tells_agreement and len(told) == len(completions):
            theirs, _ = _padded(told, "right", 0)
            off = (theirs.to(logps.device) - logps).abs() * mask
            self._check_difference(float(off.sum() / mask.sum().clamp(min=1)))
        return list(zip((entropy * mask).sum(1).tolist(), mask.sum(1).tolist(), strict=True))

    def token_logps(self, prompt_ids: Rows, completion_ids: Rows) -> list[list[float]]:
        """Return, for each completion, the log-probability of each of its tokens."""
        logps, _, mask = self.forward(prompt_ids, completion_ids)
        return [row[m].tolist() for row, m in zip(logps, mask.bool(), strict=True)]

    def logps(self, prompt_ids: Rows, completion_ids: Rows, *, model: Any = None) -> list[float]:
        """Return the summed log-probability of each completion, at the run's temperature."""
        logps, _, mask = self.forward(prompt_ids, completion_ids, model=model)
        return (logps * mask).sum(1).tolist()


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Have the model say what it says when it samples."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether the model, while it trains, leaves out some of what it computes: by a layer, or by a share it names so."""
    shares = (share for module in model.modules() for name, share in _shares(module) if "drop" in name)
    return any(isinstance(share, float) and share > 0 for share in shares)


def _shares(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    yield from (("dropout", module.p),) if isinstance(module, torch.nn.Dropout) else vars(module).items()


def refuse_unknown(engine: Any) -> None:
    """Raise ValueError for what names no engine, is none and makes none."""
    if isinstance(engine, str) and engine != "transformers":
        find_engine(engine)
    elif not (isinstance(engine, str | Engine) or callable(engine)):
        raise ValueError(
            f"engine {engine!r}: expected vllm, transformers, pkg.module:name, an Engine or what makes one"
        )


def pad_rows(
    prompt_ids: Rows, completion_ids: Rows, *, padding: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids [B, P + T], attention mask [B, P + T] and completion mask [B, T]; prompts padded left, the rest right."""
    left, left_mask = _padded(prompt_ids, "left", padding)
    right, mask = _padded(completion_ids, "right", padding)
    ids = torch.cat([left, right], dim=1).to(device)
    return ids, torch.cat([left_mask, mask], dim=1).to(device), mask.to(device)


def _padded(rows: Sequence[Sequence[float]], side: str, padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = [torch.tensor(row) for row in rows]
    ids = pad(tensors, padding_value=padding, padding_side=side)
    return ids, pad([torch.ones_like(t) for t in tensors], padding_side=side)


def own_tokens(completions: Sequence[Completion], mask: torch.Tensor) -> torch.Tensor:
    """Return which tokens of padded completions the policy wrote, as far as completions say, shaped like `mask` [B, T]."""
    own = torch.ones_like(mask)
    for i, completion in enumerate(completions):
        if completion.tool_mask is not None:
            own[i, : len(completion.tool_mask)] = torch.tensor(completion.tool_mask, device=mask.device)
    return own


def own_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mask [B, T] of what the policy wrote, of a batch of TRL's: `tool_mask` is there where a domain acts."""
    mask = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def turns_of(own: torch.Tensor) -> torch.Tensor:
    """Return in which turn of its row each token stands that the policy wrote, from 1; 0 for others. Both [B, T]."""
    before = torch.nn.functional.pad(own, (1, 0))[:, :-1]
    return ((own > before).cumsum(1) * own).long()


def sums_by_owner(values: torch.Tensor, mask: torch.Tensor, owner: Sequence[int], *, n: int) -> torch.Tensor:
    """Return, for each of `n` owners, the sum of masked `values` [B, T] over its rows and their number, [n, 2]."""
    sums = torch.zeros(n, 2, dtype=torch.float64, device=values.device)
    rows = torch.stack([(values * mask).sum(1), mask.sum(1)], dim=1).double()
    return sums.index_add_(0, torch.tensor(owner, device=values.device, dtype=torch.long), rows)
