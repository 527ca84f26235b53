"""Episodes: what acting costs beside one turn, and what is waited for tools, against the longest chain and lockstep.

The lab's policy calls a tool in every turn but its last; how long a call takes is drawn, exponentially, from what is
asked, so that all sides wait alike. Beside it, on as many episodes of its own samples, TRL's loop, which runs one episode's
tools after another's.
"""

from __future__ import annotations

import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyphony.curricula.records import Domain
from polyphony.launch.measures.result import Result, Target, Timing, in_turns, paired
from tests.benchmarks.commands import RECIPES

if TYPE_CHECKING:
    from polyphony.curricula.records import Completion
    from polyphony.trainer.engine.turns import Turns
    from polyphony.trainer.engine.vllm import Request
    from polyphony.trainer.grpo import DomainGRPOTrainer

MODEL = str(RECIPES.parent / "lab" / "policy")
EPISODES, TURNS, MEAN_S, MOST = 64, 4, 0.2, 160
"""MOST: tokens of an episode, where its policy has no room for more."""
PAIRS, ONE_TURN_PAIRS = 5, 20
LEAST = (1, 16, 32)
"""Own tokens of a turn: as the lab's policy likes, a few words, and so many that a call with arguments has."""
RANDOM: Sequence[tuple[int, dict[str, int]]] = (
    (32, {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}),
    (64, {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}),
)
"""Own tokens of a turn, and a random policy that has the room: one of which a step costs ten times the lab's, and one as the
lab's first."""
ALWAYS: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"(?=[^<])",
            "close_pattern": r"<\|end\|>|$",
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "look", "arguments": {"what": "{content}"}}},
        },
        "content": {"close_pattern": r"<\|end\|>", "content": "text"},
    },
}
"""Whatever a turn says is a call."""


@dataclass(slots=True)
class SlowTool:
    """The tool; its name is the function's."""

    mean_s: float = 0.0

    def seconds(self, what: str) -> float:
        """Return what a call takes."""
        return random.Random(what).expovariate(1 / self.mean_s) if self.mean_s else 0.0

    def look(self, what: str) -> str:
        """
        Look at something.

        Args:
            what: What.
        """
        time.sleep(self.seconds(what))
        return "12"


@dataclass(kw_only=True, slots=True)
class Clocked:
    """Turns, with the time that each was sampled for."""

    turns: Turns
    begun: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def waiting(self, wait: Any) -> Sequence[tuple[int, Request]]:
        asked = self.turns.waiting(wait)
        self.begun |= dict.fromkeys((place for place, _ in asked), time.perf_counter())
        return asked

    def take(self, place: int, completion: Completion) -> None:
        self.seconds.append(time.perf_counter() - self.begun[place])
        self.turns.take(place, completion)


@dataclass(slots=True)
class PlayedBack:
    """Turns of episodes that are over, asked for anew: nothing is parsed, rendered or waited for."""

    requests: list[list[Request]]
    """Of each episode."""
    ready: list[tuple[int, Request]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ready = [(i, turns.pop(0)) for i, turns in enumerate(self.requests)]

    @classmethod
    def of(cls, found: Sequence[Completion], requests: Sequence[Request]) -> PlayedBack:
        """Return the turns of as many own tokens, behind what was read before each."""
        return cls([_turns(c, r) for c, r in zip(found, requests, strict=True)])

    def waiting(self, wait: Any) -> Sequence[tuple[int, Request]]:
        ready, self.ready = self.ready, []
        return ready

    def take(self, place: int, completion: Completion) -> None:
        if self.requests[place]:
            self.ready.append((place, self.requests[place].pop(0)))


def _turns(c: Completion, request: Request) -> list[Request]:
    assert c.tool_mask is not None
    ids, found, at = [*request.prompt_ids, *c.ids], [], 0
    for is_own, of in itertools.groupby(c.tool_mask):
        length = len(list(of))
        if is_own:
            found.append(replace(request, prompt_ids=ids[: len(request.prompt_ids) + at], max_tokens=length))
        at += length
    return found


class ActingBatch:
    """A trainer of the lab's policy with a tool, and batches of its episodes.

    Example: `ActingBatch(folder, n=64).seconds(tool_s=0.2)`
    """

    def __init__(self, folder: str, *, n: int, policy: Path | None = None, most: int = MOST) -> None:
        """`policy`: a random one in place of the lab's; `most`: tokens of an episode."""
        from polyphony.launch.measures.side_by_side import lab_engine, twin_engine
        from polyphony.launch.measures.spine import recipe_of
        from polyphony.trainer.engine.engine import Engine
        from polyphony.trainer.engine.vllm import Request

        self.tool, self.folder, self.model, self.most = SlowTool(), folder, str(policy or MODEL), most
        self.engine = twin_engine(recipe_of(policy, steps=1), Path(folder) / "engine") if policy else lab_engine()
        self.trainer = self._trainer()
        self._lockstep = lambda turns: Engine.converse(self.engine, turns)
        table = self.trainer.data.train["strings"]
        self.prompts = self.trainer.data.tokenized([table[i] for i in table.ids[:n]])
        self.requests = [Request(prompt_ids=p.ids, seed=i, max_tokens=most) for i, p in enumerate(self.prompts)]
        self.trainer.policy.sync()

    def _config(self, **changes: Any) -> Any:
        from trl.trainer.grpo_config import GRPOConfig

        return GRPOConfig(
            output_dir=self.folder,
            max_completion_length=self.most,
            max_tool_calling_iterations=TURNS - 1,
            max_steps=1,
            learning_rate=0.0,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **changes,
        )

    def _trainer(self) -> DomainGRPOTrainer:
        from polyphony.launch.lab.world import rows
        from polyphony.trainer.grpo import DomainGRPOTrainer
        from tests.acting import tokenizer

        self.rows = rows(domain="strings", split="train", size=EPISODES, seed=1)
        held = rows(domain="strings", split="heldout", size=8, seed=1)
        domain = Domain(
            name="strings", kind="structured", train=self.rows, heldout=held, reward="exact", tools=[self.tool.look]
        )
        return DomainGRPOTrainer(
            self.model,
            self._config(per_device_train_batch_size=8, num_generations=8),
            domains=[domain],
            engine=self.engine,
            processing_class=tokenizer(ALWAYS),
        )

    def completions(self, *, tool_s: float, lockstep: bool = False) -> tuple[list[Completion], Timing, Clocked]:
        """Return a batch's episodes, how long they took, and the turns' own times."""
        self.tool.mean_s = tool_s
        seen: list[Clocked] = []
        converse = self._lockstep if lockstep else self.engine.converse

        def clocked(turns: Turns) -> None:
            seen.append(Clocked(turns=turns))
            converse(seen[0])

        assert self.trainer.episodes is not None
        with _in_place_of(self.trainer.policy, "converse", clocked):
            began, cpu = time.perf_counter(), time.process_time()
            found = self.trainer.episodes.complete(self.prompts, self.requests, 1)
        return found, Timing(time.perf_counter() - began, time.process_time() - cpu), seen[0]

    @property
    def millions(self) -> float:
        """Return the policy's parameters."""
        return sum(parameter.numel() for parameter in self.trainer.model.parameters()) / 1e6

    @contextmanager
    def sampled(self, **how: Any) -> Iterator[None]:
        """Sample meanwhile with further settings of vLLM's, such as `ignore_eos`: as many tokens as are asked for."""
        kept = self.engine.sampling
        self.engine.sampling = replace(kept, generation_kwargs=how)
        yield
        self.engine.sampling = kept

    def waited(self, completion: Completion) -> float:
        """Return the seconds that an episode's tools take."""
        assert completion.episode is not None
        calls = [m["tool_calls"] for m in completion.episode.messages if m.get("tool_calls")][: TURNS - 1]
        return sum(self.tool.seconds(call["function"]["arguments"]["what"]) for of in calls for call in of)

    def by_trl(self, *, tool_s: float) -> Timing:
        """Return what TRL's own loop takes for as many episodes."""
        from datasets import Dataset
        from trl.trainer.grpo_trainer import GRPOTrainer

        from tests.acting import tokenizer

        self.tool.mean_s = tool_s
        n = len(self.prompts)
        stock = GRPOTrainer(
            MODEL,
            lambda completions, **columns: [0.0] * len(completions),
            args=self._config(per_device_train_batch_size=n, num_generations=n, shuffle_dataset=False),
            train_dataset=Dataset.from_list(
                [{"prompt": [{"role": "user", "content": r["prompt"]}]} for r in self.rows]
            ),
            processing_class=tokenizer(ALWAYS),
            tools=[self.tool.look],
        )
        self.engine.attach(stock.model, stock.accelerator)
        stock.vllm_generation, stock.use_vllm, stock._last_loaded_step = self.engine, True, 0
        spent: list[Timing] = []
        generate = stock._generate

        def timed(prompts: list) -> Any:
            began, cpu = time.perf_counter(), time.process_time()
            found = generate(prompts)
            spent.append(Timing(time.perf_counter() - began, time.process_time() - cpu))
            return found

        stock._generate = timed  # type: ignore[method-assign]
        stock.train()
        self.engine.attach(self.trainer.model, self.trainer.accelerator)
        return spent[0]


@contextmanager
def _in_place_of(owner: Any, name: str, other: Any) -> Iterator[None]:
    setattr(owner, name, other)
    yield
    delattr(owner, name)


def bench_episodes(*, short: bool = False) -> list[Result]:
    """Time 64 episodes of four turns with slow tools and with tools that answer at once, and rows of one turn."""
    n, pairs, mean_s = (8, 1, 0.01) if short else (EPISODES, PAIRS, MEAN_S)
    with tempfile.TemporaryDirectory() as folder:
        acting = ActingBatch(folder, n=n)
        found = [_one_turn(acting, pairs=1 if short else ONE_TURN_PAIRS)]
        for least in (1,) if short else LEAST:
            found += _throughput(acting, pairs=pairs, how={"min_tokens": least}, name=f"turns of {least} and more")
        if not short:
            found += _of_random(Path(folder))
        found += _waiting(acting, pairs=pairs, mean_s=mean_s)
        trl = acting.by_trl(tool_s=mean_s)
    value, note = found[-1].value, "one run of TRL's loop, on samples of its own"
    ratio = value / trl.clock
    return [
        *found,
        Result(name="episodes, TRL's loop", value=value, unit="s", baseline=trl.clock, ratio=ratio, note=note),
    ]


def _of_random(folder: Path) -> list[Result]:
    """Turns that end after so many tokens."""
    from polyphony.launch.measures.spine import random_policy

    found = []
    for length, shape in RANDOM:
        policy = random_policy(folder / f"random{length}", **shape, vocab_size=640)
        acting = ActingBatch(str(folder), n=EPISODES, policy=policy, most=TURNS * length + 60)
        end: Any = acting.trainer.processing_class.eos_token_id  # type: ignore[union-attr]
        how = {"min_tokens": length, "logit_bias": {end: 100.0}}
        found += _throughput(acting, pairs=3, how=how, name=f"turns of {length}, {acting.millions:.2g} M")
    return found


def _one_turn(acting: ActingBatch, *, pairs: int) -> Result:
    """Rows of a domain that does not act, in a batch of turns and as ever."""
    from polyphony.trainer.environments.conversation import Conversations

    plain = [replace(prompt, domain="plain") for prompt in acting.prompts]
    episodes = acting.trainer.episodes
    assert episodes is not None

    def in_turn() -> Timing:
        batch = Conversations(plain, acting.requests, episodes._rules, episodes._events)
        return _spent(lambda: acting.engine.converse(batch))

    seen = in_turns(in_turn, lambda: _spent(lambda: acting.engine.complete(acting.requests)), pairs=pairs)
    return paired("one turn, as turns", "s", seen, target=Target(relation="<=", limit=1.03))


def _throughput(acting: ActingBatch, *, pairs: int, how: dict[str, Any], name: str) -> list[Result]:
    """Tokens of the policy's own a second, of four turns sampled so: beside one turn with as many, and beside the engine's
    own pace with the same turns, which have to read what tools answered."""
    found: list[Completion] = []

    def rate(work: Any) -> Timing:
        return _spent(work).rate(sum(c.length for c in found))

    def of_turns() -> Timing:
        with acting.sampled(**how):
            found[:], spent, _ = acting.completions(tool_s=0.0)
        return spent.rate(sum(c.length for c in found))

    def of_one() -> Timing:
        requests = [replace(r, max_tokens=c.length) for r, c in zip(acting.requests, found, strict=True)]
        with acting.sampled(ignore_eos=True):
            return rate(lambda: acting.engine.complete(requests))

    def of_engine() -> Timing:
        again = PlayedBack.of(found, acting.requests)
        with acting.sampled(ignore_eos=True):
            return rate(lambda: acting.engine.converse(again))

    of_turns()  # how long they are
    own, read = (sum(sum(m == own for m in c.tool_mask or ()) for c in found) for own in (1, 0))
    one, engine = in_turns(of_turns, of_one, pairs=pairs), in_turns(of_turns, of_engine, pairs=pairs)
    turns = sum(c.episode.turns for c in found if c.episode is not None)
    note = f"{own} own tokens in {turns} turns"
    also = f"the same turns sampled from the same tokens, {read} of them of tools, without any tool"
    return [
        paired(f"{name}, tools at once", "tok/s", one, target=Target(relation=">=", limit=0.9), note=note),
        paired(f"{name}, to the engine's pace", "tok/s", engine, note=also),
    ]


def _waiting(acting: ActingBatch, *, pairs: int, mean_s: float) -> list[Result]:
    """What is waited for slow tools: against the longest chain of generation and tools, and against lockstep."""
    chains: list[float] = []

    def ours() -> Timing:
        return acting.completions(tool_s=mean_s)[1]

    def lockstep() -> Timing:
        return acting.completions(tool_s=mean_s, lockstep=True)[1]

    seen = in_turns(ours, lockstep, pairs=pairs)
    for _ in range(pairs):
        found, _, clocked = acting.completions(tool_s=0.0)
        generation = TURNS * statistics.mean(clocked.seconds)
        acting.tool.mean_s = mean_s
        chains.append(generation + max(acting.waited(c) for c in found))
    bound = statistics.median(chains)
    turns = statistics.mean(c.episode.turns for c in found if c.episode is not None)
    bounded = [(mine, Timing(bound, mine.cpu)) for mine, _ in seen]
    note = (
        f"{len(found)} episodes, {turns:.2f} turns each; the bound: the slowest tools and four mean turns without tools"
    )
    return [
        paired("episodes, to the bound", "s", bounded, target=Target(relation="<=", limit=1.3), note=note),
        paired("episodes, to lockstep", "s", seen, target=Target(relation="<=", limit=0.8)),
    ]


def _spent(work: Any) -> Timing:
    began, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - began, time.process_time() - cpu)


BENCHMARKS = {"episodes": bench_episodes}
