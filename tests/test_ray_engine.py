"""The pool of rollout workers on a real Ray: the same completions as in-process, and what happens when workers die."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest
import ray
import torch

from polyphony.launch.build import build_trainer
from polyphony.launch.cli import main
from polyphony.launch.cluster import ray_cluster as cluster
from polyphony.launch.cluster import weights
from polyphony.launch.cluster.local import check_heads
from polyphony.launch.cluster.ray_turns import OverWorkers, Routes
from polyphony.launch.cluster.ray_workers import NO_WEIGHTS, RolloutWorker
from polyphony.launch.cluster.weights import pack, parted, unpack
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.trainer.engine.vllm import Request, sample
from polyphony.trainer.engine.weight_check import changed_adapter
from polyphony.trainer.grpo import DomainGRPOTrainer
from tests.acted import look
from tests.acting import tokenizer
from tests.conftest import POLICY, RECIPES
from tests.test_bad_input import fails
from tests.test_environments import parity
from tests.test_trainer import config, domain

DEBUG = str(RECIPES / "debug.yaml")


def test_packed_weights_come_back_as_they_were_and_are_copies():
    named = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    named |= {"odd": torch.ones(3, dtype=torch.bfloat16), "wide": torch.tensor([0.5]), "none": torch.zeros(0)}
    packed = pack(named.items())
    named["a"].zero_()  # what was gathered or merged is gone by the time the block is read
    again = dict(unpack(packed))
    assert again["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (again["b"].dtype, again["b"].tolist()) == (torch.bfloat16, [1.5, -2.0])
    assert again["wide"].tolist() == [0.5] and list(again) == list(named) and not len(again["none"])
    assert not len(dict(unpack(pack([("none", torch.zeros(0))])))["none"])
    assert packed.equals(pack([(name, tensor.clone()) for name, tensor in again.items()]))
    again["wide"] += 1
    assert not packed.equals(pack([(name, tensor) for name, tensor in named.items()]))


def test_buckets_are_full_but_for_the_last_and_a_large_parameter_is_one_by_itself():
    sizes = {"a": 2, "b": 2, "large": 9, "c": 3, "d": 1, "e": 1}
    named = [(name, torch.zeros(size)) for name, size in sizes.items()]
    assert [[name for name, _ in bucket] for bucket in parted(named, 16)] == [["a", "b"], ["large"], ["c", "d"], ["e"]]
    assert list(parted([], 16)) == []


def test_what_changed_is_refused_by_a_worker_that_has_nothing_it_is_of():
    worker = object.__new__(RolloutWorker)
    worker.version = NO_WEIGHTS
    with pytest.raises(RuntimeError, match="without whole weights was sent what changed"):
        worker.load(3, False)
    with pytest.raises(RuntimeError, match="without whole weights was sent an adapter"):
        worker.lay_on(3, None)
    assert worker.version == NO_WEIGHTS


def test_tensor_parallel_must_divide_the_heads():
    recipe = load_recipe(DEBUG, ["rollouts={engine: ray, tensor_parallel: 3}"])
    with pytest.raises(RecipeError, match=r"rollouts.tensor_parallel=3 does not divide the model's 4 heads"):
        check_heads(recipe)


def test_a_cluster_that_never_comes_up_is_named_within_its_time():
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"Ray cluster '127.0.0.1:9' did not answer within 0.5 s"):
        cluster.join("127.0.0.1:9", timeout_s=0.5)
    assert time.monotonic() - started < 5


def test_an_address_that_is_none_is_named():
    with pytest.raises(RecipeError, match="expected host:port, auto or local"):
        cluster.join("nowhere", timeout_s=0.5)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    """A trainer of the debug recipe over two workers, which have room for an adapter."""
    room = "engine_args: {enable_lora: true, max_lora_rank: 8, lora_target_modules: [q_proj, up_proj]}"
    overrides = ["tracking.wandb=null", f"rollouts={{engine: ray, workers: 2, timeout_s: 120, {room}}}"]
    trainer = build_trainer(load_recipe(DEBUG, overrides), tmp_path_factory.mktemp("pool"))
    trainer.policy.sync()
    yield trainer
    trainer.policy.engine.close()


@pytest.fixture
def small_buckets(pooled, monkeypatch):
    """A quarter MiB each, for a policy of 2.4."""
    monkeypatch.setattr(weights, "BUCKET", 2**18)
    pooled.policy.sync()
    yield
    monkeypatch.undo()
    pooled.policy.sync()


def requests(trainer, n: int = 24, *, max_tokens: int = 32) -> list[Request]:
    prompts = [prompt for table in trainer.data.train.values() for prompt in list(table)[: n // 2]]
    return [
        Request(prompt_ids=prompt.ids, seed=8 * i + k, max_tokens=max_tokens)
        for i, prompt in enumerate(trainer.data.tokenized(prompts))
        for k in range(4)
    ]


def process_of(engine, place: int) -> int:
    return ray.get(engine.pool.workers[place].ready)[1]


@pytest.mark.slow
def test_completions_are_those_of_the_in_process_engine(pooled, engine, tmp_path):
    recipe = load_recipe(DEBUG, ["tracking.wandb=null"])
    alone = build_trainer(recipe, tmp_path, engine=engine)
    alone.policy.sync()
    asked = requests(pooled)
    ours, theirs = pooled.policy.engine.complete(asked), alone.policy.engine.complete(asked)
    assert [c.ids for c in ours] == [c.ids for c in theirs]
    worst = max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x.logps, y.logps, strict=True))
    assert worst < 1e-4
    assert {c.version for c in ours} == {pooled.policy.engine.version}


@pytest.mark.slow
def test_workers_have_the_priority_of_the_trainer(pooled):
    """Ray's own is the lowest but four: beside two busy processes a worker took five minutes to start."""
    assert psutil.Process(process_of(pooled.policy.engine, 0)).nice() == psutil.Process().nice()


@pytest.mark.slow
def test_the_check_of_weights_holds_over_workers(pooled):
    assert pooled.policy.check().is_passed


@pytest.mark.slow
def test_every_parameter_of_every_worker_is_the_policys(pooled):
    with torch.no_grad():
        for parameter in pooled.model.parameters():
            parameter.mul_(1.01)
    pooled.policy.sync()
    ours = {name: p.detach() for name, p in pooled.model.named_parameters()}
    for worker in pooled.policy.engine.pool.workers:
        theirs = {name: torch.from_numpy(a.copy()) for name, a in ray.get(worker.handle.parameters.remote()).items()}
        assert compared(ours, theirs) == set(ours)


def compared(ours: dict, theirs: dict) -> set[str]:
    """Assert that each of vLLM's parameters is the policy's; return the names of the policy's that were seen."""
    seen = set()
    for name, tensor in theirs.items():
        parts = [name]
        for fused, pieces in {
            "qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "gate_up_proj": ("gate_proj", "up_proj"),
        }.items():
            if fused in name:
                parts = [name.replace(fused, piece) for piece in pieces]
        whole = torch.cat([ours[part] for part in parts])
        # vLLM pads the vocabulary
        assert torch.equal(tensor[: len(whole)], whole), name
        seen |= set(parts)
    return seen


@pytest.mark.slow
def test_workers_are_sent_the_adapter_alone_and_a_new_one_its_base_as_well(pooled, tmp_path):
    engine, lora = pooled.policy.engine, "lora={r: 6, target_modules: [q_proj, up_proj]}"
    trainer = build_trainer(load_recipe(DEBUG, ["tracking.wandb=null", lora]), tmp_path, engine=engine)
    try:
        assert trainer.policy.sends_adapter
        assert trainer.policy.check().is_passed
        base = engine.pool.weights
        asked = requests(trainer)
        with changed_adapter(trainer.model):
            trainer.policy.sync()
            expected = engine.complete(asked)
            os.kill(process_of(engine, 0), signal.SIGKILL)
            assert [c.ids for c in engine.complete(asked)] == [c.ids for c in expected]
            engine.pool.wait_for_one(of=engine.pool.workers[:1])
            again = engine.complete(asked)
            own = trainer.policy.token_logps([r.prompt_ids for r in asked], [c.ids for c in again])
        assert engine.pool.weights == base  # not sent again
        assert [c.ids for c in again] == [c.ids for c in expected]
        assert (
            max(abs(a - b) for c, own_ in zip(again, own, strict=True) for a, b in zip(c.logps, own_, strict=True))
            < 1e-4
        )
    finally:
        engine.flush_faults()
        engine.attach(pooled.model, pooled.accelerator)
        pooled.policy.sync()


@pytest.mark.slow
def test_weights_that_did_not_change_are_not_sent_again(pooled, small_buckets):
    engine = pooled.policy.engine
    before = engine.pool.workers[0].holds
    assert len(before) > 5
    asked = requests(pooled)
    said = [c.ids for c in engine.complete(asked)]
    norm = pooled.model.model.layers[0].input_layernorm.weight
    start = norm.detach().clone()
    try:
        with torch.no_grad():
            norm.mul_(-1)
        pooled.policy.sync()
        after = engine.pool.workers[0].holds
        assert sum(new != old for new, old in zip(after, before, strict=True)) == 1
        assert [c.ids for c in engine.complete(asked)] != said
        assert pooled.policy.check().is_passed
    finally:
        norm.data.copy_(start)
        pooled.policy.sync()
        engine.flush_faults()


@pytest.mark.slow
def test_a_worker_killed_while_it_samples_loses_and_doubles_nothing(pooled, small_buckets):
    asked = requests(pooled, 48, max_tokens=48)
    expected = [c.ids for c in pooled.policy.engine.complete(asked)]
    pooled.policy.engine.flush_faults()
    killer = threading.Timer(0.2, os.kill, (process_of(pooled.policy.engine, 0), signal.SIGKILL))
    killer.start()
    again = pooled.policy.engine.complete(asked)
    killer.join()
    assert [c.ids for c in again] == expected
    faults = pooled.policy.engine.flush_faults()
    if not faults.workers_restarted:  # it had answered before the signal came: the loss shows at the next call
        assert [c.ids for c in pooled.policy.engine.complete(asked)] == expected
        faults = pooled.policy.engine.flush_faults()
    assert faults.workers_restarted == 1
    assert 0 < faults.regenerated < len(asked)
    pooled.policy.engine.pool.wait_for_one(of=[pooled.policy.engine.pool.workers[0]])
    # the replacement got the weights of the last sync by itself, in all their buckets
    assert len(pooled.policy.engine.pool.workers[0].holds) > 5
    assert [c.ids for c in pooled.policy.engine.complete(asked)] == expected
    assert pooled.policy.engine.flush_faults().stale == 0


class ThreeTurns:
    """Each place has three turns; the next goes on where the last one ended, a moment after it."""

    def __init__(self, asked):
        self.ready = [(i, replace(request, episode=i)) for i, request in enumerate(asked)]
        self.late, self.open, self.said = [], dict(self.ready), {i: [] for i, _ in self.ready}

    def waiting(self, wait):
        while wait != "none" and self.open and not (self.ready or self.late):
            raise AssertionError("asked to wait while all turns are being sampled")
        ready, self.ready, self.late = self.ready if wait == "none" else self.ready + self.late, self.late, []
        return ready

    def take(self, place, completion):
        episode, request = place % 1000, self.open.pop(place)
        self.said[episode].append(list(completion.ids))
        assert completion.version is not None
        if len(self.said[episode]) < 3:
            ids = [*request.prompt_ids, *completion.ids, 7]
            following = replace(request, prompt_ids=ids, seed=request.seed + 1)
            self.open[place + 1000] = following
            self.late.append((place + 1000, following))


@pytest.mark.slow
def test_an_episode_stays_with_its_worker_and_says_what_it_would_say_in_process(pooled, engine, tmp_path, monkeypatch):
    alone = build_trainer(load_recipe(DEBUG, ["tracking.wandb=null"]), tmp_path, engine=engine)
    alone.model.load_state_dict(pooled.model.state_dict())  # other tests change it
    alone.policy.sync()
    pooled.policy.sync()
    ours, theirs = (ThreeTurns(requests(pooled, 8, max_tokens=8)) for _ in range(2))
    over, dealt = OverWorkers(pooled.policy.engine, ours), []
    deal = over.routes.deal
    monkeypatch.setattr(Routes, "deal", lambda self, *given: dealt.append(deal(*given)) or dealt[-1])
    over.converse()
    alone.policy.engine.converse(theirs)
    assert ours.said == theirs.said
    at = [(turn.episode, worker) for of in dealt for worker, turns in of.items() for _, turn in turns]
    assert len(at) == 3 * len(ours.said) and len(set(at)) == len(ours.said)
    assert {worker for _, worker in at} == {0, 1}


@pytest.mark.slow
def test_turns_of_a_worker_that_is_lost_are_sampled_by_another(pooled):
    expected, again = (ThreeTurns(requests(pooled, 8, max_tokens=8)) for _ in range(2))
    pooled.policy.engine.converse(expected)
    pooled.policy.engine.flush_faults()
    doomed, take = [process_of(pooled.policy.engine, 0)], again.take

    def lose_one_then_take(*given):
        if doomed:  # at the first turn that is whole: all episodes of that worker have others before them
            os.kill(doomed.pop(), signal.SIGKILL)
        take(*given)

    again.take = lose_one_then_take
    pooled.policy.engine.converse(again)
    assert again.said == expected.said
    faults = pooled.policy.engine.flush_faults()
    assert faults.workers_restarted == 1 and faults.regenerated > 0
    pooled.policy.engine.pool.wait_for_one(of=[pooled.policy.engine.pool.workers[0]])


def test_turns_go_where_their_episode_is_and_groups_where_least_is_to_do():
    routes = Routes()
    asked = [(n, Request(prompt_ids=[n // 2], seed=0, max_tokens=9 - n // 2, episode=n)) for n in range(6)]
    dealt = routes.deal(asked, [0, 1])
    # groups of two: 18 tokens and their prompt go first, 16 to the other, 14 where 16 are
    assert {w: [place for place, _ in turns] for w, turns in dealt.items()} == {0: [0, 1], 1: [2, 3, 4, 5]}
    for worker, turns in dealt.items():
        for place, _ in turns:
            routes.whole(worker, place)
    later = [(10 + n, replace(request, prompt_ids=[n, 5])) for n, (_, request) in enumerate(asked)]
    assert {w: len(turns) for w, turns in routes.deal(later, [0, 1]).items()} == {0: 2, 1: 4}
    lost = routes.lost(1)
    assert [place for place, _ in lost] == [12, 13, 14, 15]
    assert {w: len(turns) for w, turns in routes.deal(lost, [0]).items()} == {0: 4}


@pytest.mark.slow
def test_a_worker_with_old_weights_is_refused_and_replaced(pooled):
    asked = requests(pooled)
    expected = [c.ids for c in pooled.policy.engine.complete(asked)]
    worker = pooled.policy.engine.pool.workers[1]
    ray.get(worker.handle.call_it.remote(pooled.policy.engine.version - 1))
    pooled.policy.engine.flush_faults()
    assert [c.ids for c in pooled.policy.engine.complete(asked)] == expected
    faults = pooled.policy.engine.flush_faults()
    assert (faults.workers_restarted, faults.stale) == (1, faults.regenerated)
    assert pooled.policy.engine.pool.workers[1] is not worker


@pytest.mark.slow
def test_old_weights_are_kept_where_the_recipe_allows_and_completions_say_so(pooled):
    asked = requests(pooled)
    pooled.policy.engine.pool.wait_for_one(of=[pooled.policy.engine.pool.workers[1]])
    behind = pooled.policy.engine.version - 1
    ray.get(pooled.policy.engine.pool.workers[1].handle.call_it.remote(behind))
    pooled.policy.engine.flush_faults()
    object.__setattr__(pooled.policy.engine.rollouts, "max_staleness", 1)
    try:
        completions = pooled.policy.engine.complete(asked)
    finally:
        object.__setattr__(pooled.policy.engine.rollouts, "max_staleness", 0)
        pooled.policy.sync()
    faults = pooled.policy.engine.flush_faults()
    assert faults.stale == sum(c.version == behind for c in completions) > 0
    assert faults.workers_restarted == 0


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced_after_its_time_and_sent_weights_where_nobody_has_any(pooled, monkeypatch):
    """Weights that are not kept, as over NCCL: a replacement comes up without any, and waits while others have them."""
    engine, asked = pooled.policy.engine, requests(pooled)
    expected = [c.ids for c in engine.complete(asked)]
    sent, send = [], engine._send
    monkeypatch.setattr(engine, "_send", lambda: sent.append(engine.version) or send())
    monkeypatch.setattr(engine.pool, "weights", None)
    process, settings, replace_it = process_of(engine, 0), engine.rollouts, engine.pool.replace

    def replaced(worker, *, because):
        object.__setattr__(settings, "timeout_s", 120.0)  # for the other, beside one that starts
        replace_it(worker, because=because)

    monkeypatch.setattr(engine.pool, "replace", replaced)
    os.kill(process, signal.SIGSTOP)
    object.__setattr__(settings, "timeout_s", 8.0)
    try:
        again = engine.complete(asked)
    finally:
        object.__setattr__(settings, "timeout_s", 120.0)
    assert [c.ids for c in again] == expected
    assert engine.flush_faults().workers_restarted == 1
    deadline = time.monotonic() + 20
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the hung process was left running"
        time.sleep(0.1)
    replacement = engine.pool.workers[0]
    engine.pool.wait_for_one(of=[replacement])
    assert not sent and not replacement.has_weights
    os.kill(process_of(engine, 1), signal.SIGKILL)
    completions = engine.complete(asked)
    assert [c.ids for c in completions] == expected
    assert {c.version for c in completions} == {engine.version}
    assert sent == [engine.version] and replacement.has_weights
    assert engine.flush_faults().workers_restarted == 1


@pytest.mark.slow
def test_more_workers_than_the_cluster_has_room_for_end_in_one_line(capsys, tmp_path, pooled):
    workers = int(ray.cluster_resources()["CPU"]) + 1
    overrides = [f"rollouts={{engine: ray, workers: {workers}, start_timeout_s: 5}}", "tracking.wandb=null"]
    started = time.monotonic()
    assert main(["train", DEBUG, *overrides, "--out", str(tmp_path / "run")]) == 2
    assert f"rollouts.workers={workers} of 1 CPU each need {workers}" in capsys.readouterr().err.splitlines()[-1]
    assert time.monotonic() - started < 60
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_engine_out_of_memory_tries_half_and_then_says_so(engine, debug_recipe, tmp_path):
    trainer = build_trainer(debug_recipe, tmp_path, engine=engine)
    trainer.policy.sync()
    asked = requests(trainer, 4)  # 16 completions
    expected = [c.ids for c in sample(engine.llm, asked, engine.sampling)]
    for room, fits in ((len(asked) * 3 // 4, True), (1, False)):
        handle = engine.llm.apply_model(lambda model, room=room: model.register_forward_pre_hook(full_above(room)))[0]
        try:
            if fits:
                assert [c.ids for c in sample(engine.llm, asked, engine.sampling)] == expected
            else:
                with pytest.raises(RuntimeError, match="ran out of memory on 16 completions and again on half of them"):
                    sample(engine.llm, asked, engine.sampling)
        finally:
            handle.remove()
    # the engine serves on
    assert [c.ids for c in sample(engine.llm, asked, engine.sampling)] == expected


def full_above(room: int):
    """Return a hook that has no memory for a decoding step of more than `room` sequences."""

    def hook(model, arguments):
        from vllm.forward_context import get_forward_context

        metadata = next(iter(get_forward_context().attn_metadata.values()))
        if len(metadata.seq_lens) > room:
            raise torch.OutOfMemoryError(f"{len(metadata.seq_lens)} sequences")

    return hook


@pytest.mark.slow
def test_a_domain_that_acts_is_trained_over_workers(pooled, tmp_path):
    trainer = DomainGRPOTrainer(
        str(POLICY),
        config(tmp_path, max_steps=1, max_completion_length=24, max_tool_calling_iterations=1),
        domains=[domain("arithmetic", reward=parity, tools=[look])],
        engine=pooled.policy.engine,
        processing_class=tokenizer(),
    )
    trainer.train()
    (told,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert told["environment/arithmetic/turns"] > 1 and told["loss"] != 0


def test_a_version_mismatch_is_one_line():
    text = "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\nThis process:\n    Ray: 2.60.0"
    said = cluster.reason(text)
    assert "\n" not in said
    assert "Ray: 2.9.0" in said
    assert "install the same Ray and Python on both sides" in said


def test_unknown_keys_of_the_pool_are_refused(capsys):
    assert "unknown key 'rollouts.wrkers'; did you mean 'workers'?" in fails(
        capsys, "train", DEBUG, "rollouts.wrkers=2"
    )
