"""`algorithm: sft`: experts' answers are sampled, learned from and evaluated; a resume is exact; what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.sft_config import SFTConfig

from polyphony.launch.build import grpo_config, load_data, missing_names
from polyphony.launch.build_sft import build_sft
from polyphony.launch.cli import main
from polyphony.launch.preflight import sizes
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.train import claim_folder, start
from polyphony.launch.verbs.sample import sample
from polyphony.trainer.run.folder import RunFolder
from polyphony.trainer.settings import UpdateSettings
from polyphony.trainer.sft.passes import learned, plan_passes, steps_of_pass
from polyphony.trainer.sft.rows import read_answers
from polyphony.trainer.sft.settings import OF_DRAWS
from polyphony.trainer.sft.trainer import sft_config
from polyphony.trainer.slots import plan_draws
from tests.conftest import POLICY, write_rows
from tests.forks import forked_ranks
from tests.ranks import be_tuned, losses_of
from tests.taught import recipe_of
from tests.test_training_group import told_to_ranks

SMALL = ["domains.sums.train.size=12", "domains.words.train.size=12", "grpo.per_device_train_batch_size=4"]
SFT = ["algorithm=sft", "teachers={}", "domains.sums.teacher=null", "domains.words.teacher=null", "curriculum={}"]
STEPS = ["grpo.max_steps=4", "eval.every=2", "checkpoint.every=2"]


def learning(folder, answers, *overrides):
    """The recipe of the sample, to learn from what it wrote."""
    document = json.loads((folder / "recipe.yaml").read_text())
    del document["grpo"]["num_generations"]
    (folder / "sft.yaml").write_text(json.dumps(document))
    return load_recipe(folder / "sft.yaml", [*SFT, *SMALL, f"sft.answers={answers}", *STEPS, *overrides])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A recipe, and what the policy itself answers right, of two domains."""
    folder = tmp_path_factory.mktemp("world")
    domains = {"sums": ("arithmetic", "t"), "words": ("strings", "t")}
    told = recipe_of(folder, {"t": {"model": "self"}}, *SMALL, "distil.others=skip", **domains)
    sample(told, folder / "sampled", per_prompt=2)
    return folder


def lines(run, name="metrics"):
    return RunFolder(run).read(name)


@pytest.fixture(scope="module")
def undisturbed(world):
    recipe = learning(world, world / "sampled")
    claim_folder(recipe, world / "whole", resume=False)
    start(recipe, world / "whole").train()
    return world / "whole"


@pytest.mark.slow
def test_what_was_sampled_is_learned_evaluated_and_reported(world, undisturbed, capsys):
    metrics = lines(undisturbed)
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in metrics if "heldout/sums/score" in line] == [0, 2, 4]
    rows = json.loads((undisturbed / "transfer.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert rows[-1]["trained"] == ["sums", "words"] and sum(rows[-1]["exposure"].values()) == 16
    known = json.loads((undisturbed / "provenance.json").read_text())["data"]
    n_answers = len(lines(world / "sampled", "rows"))
    assert sum(known[f"sft.answers ({name})"]["rows"] for name in ("sums", "words")) == n_answers
    assert main(["eval", str(undisturbed), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"sums", "words"}
    assert main(["report", str(undisturbed)]) == 0
    assert (undisturbed / "final" / "model.safetensors").read_bytes() != (POLICY / "model.safetensors").read_bytes()


class PulledPlug(TrainerCallback):
    """Ends the process, nearly, after the third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_bit_for_bit(world, undisturbed):
    recipe, cut = learning(world, world / "sampled"), world / "cut"
    claim_folder(recipe, cut, resume=False)
    trainer = start(recipe, cut)
    trainer.add_callback(PulledPlug())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    start(recipe, cut).train(resume_from_checkpoint=True)

    def numbers(run):
        timed = ("runtime", "per_second", "train_loss")
        return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines(run)]

    assert numbers(cut) == numbers(undisturbed)
    assert (cut / "transfer.json").read_bytes() == (undisturbed / "transfer.json").read_bytes()
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (cut, undisturbed)]
    assert weights[0] == weights[1]
    ledger = RunFolder(world / "sampled").rows  # other answers now
    kept = ledger.read_bytes()
    ledger.write_bytes(kept + kept.splitlines(keepends=True)[0])
    with pytest.raises(RecipeError, match=r"sft.answers \(sums\): its rows are not those that the run has practised"):
        start(recipe, cut)
    ledger.write_bytes(kept)


@pytest.mark.slow
def test_an_adapter_is_learned_and_goes_on_bit_for_bit(world, tmp_path):
    recipe = learning(
        world, world / "sampled", "lora={r: 2, target_modules: [q_proj, v_proj]}", "grpo.learning_rate=1e-2"
    )
    claim_folder(recipe, tmp_path / "whole", resume=False)
    start(recipe, tmp_path / "whole").train()
    claim_folder(recipe, tmp_path / "cut", resume=False)
    trainer = start(recipe, tmp_path / "cut")
    trainer.add_callback(PulledPlug())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors").exists()
    resumed = start(recipe, tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    whole, cut = ((tmp_path / run / "transfer.json").read_bytes() for run in ("whole", "cut"))
    assert whole == cut
    adapters = [
        load_file(tmp_path / run / "final" / "adapter" / "adapter_model.safetensors") for run in ("whole", "cut")
    ]
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())
    assert all(tensor.any() for name, tensor in adapters[0].items() if "lora_B" in name)  # they begin at 0


@pytest.mark.slow
def test_the_loss_is_that_of_the_answers_tokens_alone(world, tmp_path):
    n_answers = len(lines(world / "sampled", "rows"))
    whole = [f"grpo.per_device_train_batch_size={n_answers}", "grpo.max_steps=1", "grpo.learning_rate=0"]
    trainer = build_sft(learning(world, world / "sampled", *whole), tmp_path / "run")
    answers = read_answers(str(world / "sampled"), trainer.data)
    end = trainer.data.tokenizer.eos_token_id
    assert all(answer.ids[-1] == end and trainer.policy.decode(answer.ids) == answer.text for answer in answers)
    with torch.no_grad():
        logps = trainer.policy.token_logps([a.prompt.ids for a in answers], [a.ids for a in answers])
    trainer.train()
    told = [value for of in logps for value in of]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-sum(told) / len(told), abs=1e-4)
    assert sum(trainer.curriculum.drawn.values()) == n_answers
    with pytest.raises(ValueError, match="algorithm sft: this trainer samples and evaluates"):
        trainer.sampler.train()


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_pass_ends_with_a_step_of_what_is_left(world, tmp_path, accumulation):
    n_answers = len(lines(world / "sampled", "rows"))
    of_batch = next(size for size in (4, 3, 5, 7) if n_answers % size)
    per_pass = math.ceil(math.ceil(n_answers / of_batch) / accumulation)
    passes = [f"grpo.per_device_train_batch_size={of_batch}"]
    passes += [f"grpo.gradient_accumulation_steps={accumulation}", "grpo.max_steps=-1", "grpo.num_train_epochs=3"]
    recipe = learning(world, world / "sampled", *passes, "eval.every=1", "checkpoint.every=1")
    trainer = build_sft(recipe, tmp_path / "run")
    trainer.train()
    assert trainer.plan.steps == trainer.state.global_step == 3 * per_pass
    assert trainer.state.epoch == 3 and sum(trainer.curriculum.drawn.values()) == 3 * n_answers
    told = sizes(recipe, grpo_config(recipe, tmp_path), trainer.data)[1]
    assert told == f"training: {3 * per_pass} steps, {3 * n_answers} of {n_answers} answers, 3 passes"


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_does_where_the_last_batch_of_a_pass_is_not_full(world, tmp_path):
    n_answers = len(lines(world / "sampled", "rows"))
    # the second rank has no answer in the last batch
    size = next(size for size in (4, 3, 5, 7) if 0 < n_answers % (2 * size) <= size)
    passes = ["grpo.max_steps=-1", "grpo.num_train_epochs=2", "grpo.learning_rate=1e-3", "eval.every=100"]
    both = [*SFT, *SMALL, f"sft.answers={world / 'sampled'}", *passes, "checkpoint.every=100"]
    alone = build_sft(
        learning(world, world / "sampled", *both, f"grpo.per_device_train_batch_size={2 * size}"), tmp_path / "alone"
    )
    alone.train()
    told = told_to_ranks("ddp", tmp_path)
    overrides = [*both, f"grpo.per_device_train_batch_size={size}"]
    for rank in forked_ranks(be_tuned, world / "sft.yaml", tmp_path, overrides, log=tmp_path / "log", **told):
        assert rank.wait(200) == 0, rank.said[-5000:]
    for seen in (json.loads((tmp_path / f"rank-{n}.json").read_text()) for n in (0, 1)):
        assert seen["drawn"] == dict(alone.curriculum.drawn) and sum(seen["drawn"].values()) == 2 * n_answers
        assert seen["losses"] == pytest.approx(losses_of(alone), abs=1e-4)


def test_passes_are_counted_as_transformers_does(recipe, tmp_path):
    grpo = "grpo={max_steps: -1, num_train_epochs: 1.5, per_device_train_batch_size: 4, gradient_accumulation_steps: 2"
    grpo += ", bf16: false, max_completion_length: 8, use_cpu: true}"
    args = grpo_config(load_recipe(recipe, ["algorithm=sft", grpo, "sft.answers=rows.jsonl"]), tmp_path)
    assert [steps_of_pass(args, n) for n in (1, 8, 9, 17)] == [1, 1, 2, 3]
    assert plan_passes(args, 17).steps == 5
    assert [learned(args, steps, 17) for steps in (1, 3, 5)] == [8, 17, 33]
    args.max_steps = 7
    assert plan_passes(args, 17).steps == 7


def test_one_process_uses_one_of_several_gpus_as_by_grpo(recipe, tmp_path):
    grpo = "grpo={max_steps: 2, bf16: false, max_completion_length: 8, use_cpu: true}"
    args = grpo_config(load_recipe(recipe, ["algorithm=sft", grpo, "sft.answers=rows.jsonl"]), tmp_path)
    args._n_gpu = 1 + sft_config(args, plan_draws(args, 8)).n_gpu
    assert sft_config(args, plan_draws(args, 8)).n_gpu == args.n_gpu


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["pool={}"], "pool with algorithm: sft"),
        (["guard={}"], "guard with algorithm: sft"),
        (["update.drop_dead=always"], "update with algorithm: sft"),
        (["curriculum.scheduler=joint"], "curriculum with algorithm: sft"),
        (["teachers={t: {model: self}}"], "teachers with algorithm: sft"),
        (["entropy.control=coefficient"], "entropy.control with algorithm: sft"),
        (["domains.sums.weight=2"], "domains.sums.weight with algorithm: sft"),
        (
            ["domains.words.diversity={partitioner: exact, shape: [1, 0]}"],
            "domains.words.diversity with algorithm: sft",
        ),
        (["grpo.num_generations=4"], "grpo.num_generations with algorithm: sft"),
        (["grpo.beta=0.1"], "grpo.beta with algorithm: sft"),
        (["grpo.temperature=0.7"], "grpo.temperature=0.7 with algorithm: sft"),
        (["cluster.strategy=zero2"], "cluster.strategy=zero2 with algorithm: sft"),
        (
            ["guardrails={sums: {max_drop: 0.1, action: rollback}}"],
            "guardrails.sums.action=rollback with algorithm: sft",
        ),
        (["sft.answers=null"], "algorithm: sft needs sft.answers"),
    ],
)
def test_what_acts_on_draws_is_refused_by_name(recipe, overrides, said):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, ["algorithm=sft", "grpo={max_steps: 2}", "sft.answers=rows.jsonl", *overrides])
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_all_that_acts_on_draws_is_refused_at_once(recipe):
    others = ["pool={}", "domains.sums.weight=2", "grpo.num_generations=4", "grpo.temperature=0.7", "sft.answers=null"]
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, ["algorithm=sft", "grpo={max_steps: 2}", *others])
    assert str(refused.value) == (
        "pool, domains.sums.weight, grpo.num_generations with algorithm: sft: a file of answers is learned from, nothing is "
        "drawn; leave them out; grpo.temperature=0.7 with algorithm: sft: its loss is at 1, and held-out answers are "
        "sampled as was learned; leave it out; algorithm: sft needs sft.answers, the rows to learn from; `polyphony sample` "
        "writes them"
    )


def test_answers_that_are_not_there_are_named_once_before_torch_comes(recipe, capsys):
    told = load_recipe(recipe, ["algorithm=sft", "grpo={max_steps: 2}", "sft.answers=none.jsonl"])
    (line,) = missing_names(told)[""]
    assert line == f"sft.answers: file {recipe.parent / 'none.jsonl'} does not exist"
    grpo = "grpo={max_steps: 2, bf16: false, max_completion_length: 8}"
    assert main(["train", str(recipe), "--dry-run", "algorithm=sft", grpo, "sft.answers=none.jsonl"]) == 2
    assert capsys.readouterr().err == f"polyphony train: {line}\n"
    (recipe.parent / "empty").mkdir()
    told = load_recipe(recipe, ["algorithm=sft", "grpo={max_steps: 2}", "sft.answers=empty"])
    assert "has no rows.jsonl" in missing_names(told)[""][0]


RIGHT = {"domain": "sums", "id": "train-1", "completion": "1"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"domain": "sums", "id": "train-1", "response": "1"}, "has no `completion`, did you mean `response`?"),
        (RIGHT | {"completion": " "}, "a `completion` is text, and not empty, got ' '"),
        (
            RIGHT | {"completion": "<|start_header_id|>1"},
            "'<|start_header_id|>' is of a chat template, not of an answer",
        ),
        (RIGHT | {"truncated": "false"}, "`truncated` is true or false, got 'false'"),
        (RIGHT | {"domain": "sum"}, "unknown domain 'sum'; did you mean 'sums'?"),
        (RIGHT | {"id": "heldout-1"}, "id 'heldout-1' is of a held-out row of domain 'sums'"),
        (RIGHT | {"id": "7"}, "id '7' is of no training row of domain 'sums'"),
        (RIGHT | {"prompt": "1 + 1 ="}, "it answers '1 + 1 =', and the prompt of id 'train-1' is 'train sums 1 ='"),
        (RIGHT | {"completion": "1 " * 600}, "tokens with its prompt, the context holds"),
        (None, "sft.answers: no rows in"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_named(recipe, tmp_path, row, said):
    write_rows(tmp_path / "rows.jsonl", [] if row is None else [RIGHT, row])
    grpo = "grpo={max_steps: 2, bf16: false, max_completion_length: 8}"
    told = load_recipe(recipe, ["algorithm=sft", grpo, "sft.answers=rows.jsonl"])
    data = load_data(told, grpo_config(told, tmp_path))
    with pytest.raises(ValueError) as refused:
        read_answers(told.sft.answers, data)
    assert said in str(refused.value) and str(refused.value).startswith("sft.answers")


SAMPLING = """
    cache_implementation chat_template_kwargs disable_dropout ds3_gather_for_generation generation_kwargs
    max_completion_length min_p num_generations_eval repetition_penalty temperature top_k top_p
    transformers_continuous_batching_config use_transformers_continuous_batching use_transformers_paged use_vllm
    vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_max_model_length vllm_mode vllm_model_impl
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex
    vllm_tensor_parallel_size
"""
"""Fields of GRPO alone that say how held-out answers are sampled."""


def test_every_field_of_grpo_is_one_of_fine_tuning_too_or_of_sampling_or_is_refused():
    own = {f.name for f in fields(GRPOConfig)} - {f.name for f in fields(SFTConfig)}
    assert own - {*SAMPLING.split()} == OF_DRAWS - {"loss_type", "use_liger_kernel"}
    assert UpdateSettings(sft={"answers": "x"}).algorithm == "sft"
