"""Teachers before any weight is loaded: contexts, vocabularies, files of weights, what excludes what, groups of one."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from polyphony.curricula.records import Completion, Prompt
from polyphony.launch.build import build_trainer, check_names, grpo_config, untaught
from polyphony.launch.recipe import RecipeError, load_recipe
from polyphony.launch.verbs.probe import probe
from polyphony.trainer.run.folder import UNFINISHED_FILE
from polyphony.trainer.settings import UpdateSettings
from polyphony.trainer.single import single_config
from polyphony.trainer.teachers.context import in_context
from polyphony.trainer.teachers.distil import COLUMNS, Distil
from polyphony.trainer.teachers.settings import DistilSettings, TeacherSettings
from polyphony.trainer.teachers.weights import FILES, TeacherWeights, differing, lacking
from tests.conftest import POLICY
from tests.taught import recipe_of

SELF = ["algorithm=distil", "rollouts.engine=transformers", "teachers={t: {model: self}}", "domains.sums.teacher=t"]
BOTH = [*SELF, "domains.words.teacher=t"]


def row(prompt="2 + 2 =") -> Prompt:
    return Prompt(domain="sums", id="7", prompt=prompt, columns={"answer": "4", "note": None})


def test_a_context_stands_where_the_policy_reads_the_last_message():
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="}]
    assert in_context("{prompt} It is {answer}.", row()).prompt == "2 + 2 = It is 4."
    assert in_context("It is {answer}, {{so}}.", row()).prompt == "It is 4, {so}.\n\n2 + 2 ="
    assert in_context("{answer}! {prompt}", row(chat)).prompt == [chat[0], {"role": "user", "content": "4! 2 + 2 ="}]
    assert in_context("{prompt}", row("a {brace}")).prompt == "a {brace}"  # what is filled in is not filled in again


def test_of_the_attempt_a_teacher_may_read_its_text_its_reward_and_what_the_reward_told_of_it():
    context = "{prompt} {attempt}: {reward}. {feedback} {answer}"
    said = Completion(ids=(1,), prompt=row(), text="5 {x}", reward=0.5)
    told = replace(said, feedback="Too high.", reward=None)
    assert in_context(context, row(), said).prompt == "2 + 2 = 5 {x}: 0.5. The reward is 0.5. 4"
    assert in_context(context, row(), told).prompt == "2 + 2 = 5 {x}: unknown. Too high. 4"
    assert in_context(context, row()).prompt == "2 + 2 = : .  4"
    taken = replace(row(), columns={"reward": 1})
    with pytest.raises(ValueError, match="row '7' has a field 'reward', which in a context is the attempt's"):
        in_context("{reward}", taken, said)


@pytest.mark.parametrize("name", ["proof", "note"])
def test_a_field_that_a_row_lacks_or_has_as_null_is_named(name):
    with pytest.raises(ValueError, match=f"domain 'sums': row '7' has no field '{name}', which the context names"):
        in_context(f"{{{name}}}", row())


@pytest.mark.parametrize("context", ["{answer", "{}", "{answer.x}", "{answer!r}", "{answer:5}", "{0}"])
def test_a_template_has_plain_fields(context):
    with pytest.raises(ValueError, match="stand for"):
        TeacherSettings(model="self", context=context)


def test_rejection_sampling_and_distillation_are_two_algorithms():
    assert UpdateSettings(distil={}).algorithm == "distil"
    with pytest.raises(ValueError, match="rft and distil are two algorithms"):
        UpdateSettings(distil={}, rft={})


# --- groups of one ----------------------------------------------------------------------------------------------------


def test_trl_refuses_groups_of_one_by_one_comparison_and_that_is_lifted(tmp_path):
    fields = {"output_dir": str(tmp_path), "bf16": False, "loss_type": "grpo"}
    with pytest.raises(ValueError, match="GRPO requires at least 2 generations per prompt"):
        GRPOConfig(**fields, num_generations=1)
    checks = re.findall(r"num_generations [<>] \w+", inspect.getsource(GRPOConfig.__post_init__))
    assert checks == ["num_generations < 2"]
    one = single_config(**fields)
    assert (one.num_generations, type(one.num_generations), type(one)) == (1, int, GRPOConfig)
    with pytest.raises(ValueError, match="generation_batch_size"):  # any other check stands
        single_config(**fields, generation_batch_size=3)


def test_trls_loss_takes_an_advantage_a_token():
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "if advantages.dim() == 1:\n            advantages = advantages.unsqueeze(1)" in source
    assert 'self._logs["advantages"].extend(all_process_advantages.tolist())' in inspect.getsource(
        GRPOTrainer._generate_and_score_completions
    )


def test_distillation_averages_over_each_completion_unless_the_recipe_says_otherwise(recipe, tmp_path):
    assert grpo_config(load_recipe(recipe), tmp_path).loss_type == "dapo"
    assert grpo_config(load_recipe(recipe, BOTH), tmp_path).loss_type == "grpo"
    assert grpo_config(load_recipe(recipe, [*BOTH, "grpo.loss_type=dapo"]), tmp_path).loss_type == "dapo"
    assert grpo_config(load_recipe(recipe, [*BOTH, "grpo.num_generations=1"]), tmp_path).num_generations == 1


# --- refused by the recipe --------------------------------------------------------------------------------------------

THERE = "{endpoint: 'http://127.0.0.1:9/v1'}"
WATCHED = ["domains.words.train=null", "domains.words.teacher=t"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["grpo.num_generations=1"], "grpo.num_generations=1 is for algorithm: distil"),
        (["domains.sums.teacher=t"], "domains.sums.teacher: teachers are for algorithm: distil"),
        (["teachers={t: {model: self}}"], "teachers: teachers are for algorithm: distil"),
        (["curriculum.scheduler=d3"], "curriculum.scheduler d3 goes by distances to teachers"),
        (["algorithm=distil"], "algorithm: distil needs a teacher"),
        ([*SELF, *WATCHED], "domains.words.teacher: a watched domain is not trained"),
        ([*SELF, "domains.words.teacher=tt"], "domains.words.teacher: unknown teacher 'tt'; did you mean 't'?"),
        ([*SELF, "grpo.num_generations=1"], "domain 'words' has no teacher, and a group of one"),
        ([*BOTH, "grpo.num_generations=1", "distil.reward_weight=0.5"], "distil.reward_weight=0.5 with grpo.num_gen"),
        ([*SELF, "distil.others=skip", "pool={}"], "pool.refill would replace every group of domain 'words'"),
        ([*BOTH, "pool={when_exhausted: stop}"], "pool.when_exhausted=stop, and every trained domain has a teacher"),
        ([*BOTH, "grpo.loss_type=vespo"], "grpo.loss_type=vespo with algorithm: distil"),
        ([*BOTH, "grpo.loss_type=bnpo"], "grpo.loss_type=bnpo with algorithm: distil"),
        ([*BOTH, "grpo.off_policy_mask_threshold=0.5"], "grpo.off_policy_mask_threshold=0.5 with algorithm: distil"),
        ([*BOTH, "grpo.cast_lm_head_to_fp32=true"], "grpo.cast_lm_head_to_fp32=True with algorithm: distil"),
        ([*BOTH, "grpo.importance_sampling_level=sequence"], "grpo.importance_sampling_level=sequence with"),
        ([*BOTH, "distil.clip=0"], "distil.clip: "),
        ([*BOTH, "teachers.t.model=./gone"], "teachers.t.model: folder "),
        ([*BOTH, "teachers.t.modle=self"], "unknown key 'teachers.t.modle'; did you mean 'model'?"),
        ([*BOTH, "teachers.t={context: '{prompt}'}"], "teachers.t: needs weights: model, or endpoint"),
        ([*BOTH, "teachers.t.endpoint=http://x/v1"], "teachers.t: model self and an endpoint exclude each other"),
        ([*BOTH, "teachers.t.client={timeout_s: 5}"], "teachers.t.client: it is for a teacher behind an endpoint"),
        ([*BOTH, f"teachers.t={THERE}", "grpo.temperature=0.7"], "grpo.temperature=0.7 with teachers.t.endpoint: "),
        ([*BOTH, f"teachers.t={THERE}", "grpo.top_p=0.9"], "grpo.top_p=0.9 with teachers.t.endpoint: "),
        ([*BOTH, f"teachers.t={THERE}", "grpo.top_k=20"], "grpo.top_k=20 with teachers.t.endpoint: "),
        *(
            ([*BOTH, f"teachers.t={THERE}", f"grpo.generation_kwargs={{{said}}}"], f"grpo.generation_kwargs.{name}=")
            for said in ("temperature: 0.5", "top_p: 0.9", "top_k: 20", "min_p: 0.1", "repetition_penalty: 1.2")
            for name in [said.partition(":")[0]]
        ),
        ([*BOTH, "teachers.t.context='{answer'"], "teachers.t.context: "),
    ],
)
def test_what_contradicts_is_one_line(recipe, overrides, line):
    with pytest.raises(RecipeError) as refused:
        load_recipe(recipe, overrides)
    assert refused.value.problems[0].startswith(line), refused.value.problems


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        ("{endpoint: 'tutor:8000'}", "teachers.t: endpoint must be an http(s) address up to /v1, got 'tutor:8000'"),
        ("{endpoint: 'http://x/v1', client: {cache: a}}", "teachers.t.client: unknown argument 'cache'"),
        ("{endpoint: 'http://x/v1', client: {timeout_s: 0}}", "teachers.t: timeout_s must be > 0, got 0"),
        ("{endpoint: 'http://x/v1', client: {timeout_s: a}}", "teachers.t.client: timeout_s: expected"),
    ],
)
def test_an_endpoint_that_cannot_be_one_is_one_line(recipe, teacher, line):
    with pytest.raises(RecipeError) as refused:
        check_names(load_recipe(recipe, [*BOTH, f"teachers.t={teacher}"]))
    assert str(refused.value).startswith(line)


def test_only_taught_domains_do_not_need_a_group(recipe):
    overrides = [*SELF, "distil.others=skip", "grpo.num_generations=1"]
    assert load_recipe(recipe, overrides).distil.others == "skip"


# --- refused before weights are loaded: the fixture's model has none ----------------------------------------------------


def foreign(folder):
    """Another tokenizer: two tokens have changed places."""
    text = (folder / "tokenizer.json").read_text()
    document = json.loads(text)
    vocabulary = document["model"]["vocab"]
    left, right = list(vocabulary)[100:102]
    vocabulary[left], vocabulary[right] = vocabulary[right], vocabulary[left]
    (folder / "tokenizer.json").write_text(json.dumps(document))


def ends_otherwise(folder):
    document = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(document | {"eos_token": "<|user|>"}))


def half_written(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def a_shard_without_an_index(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")


def one_shard_of_three(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00003.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00003.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").touch()


def half_a_pickle(folder):
    torch.save({"model.norm.weight": torch.ones(64)}, folder / "whole.bin")
    (folder / "pytorch_model.bin").write_bytes((folder / "whole.bin").read_bytes()[:-100])
    (folder / "model.safetensors").unlink()


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def too_small(folder):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | {"vocab_size": 600}))


def of_another_base(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def cut_off(folder):
    (folder / UNFINISHED_FILE).touch()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (foreign, "has another vocabulary than the policy: token "),
        (ends_otherwise, "has another vocabulary than the policy: eos_token is '<|end|>' here and '<|user|>' there"),
        (half_written, "model.safetensors is damaged"),
        (a_shard_without_an_index, "model.safetensors.index.json is missing, by which model-00001-of-"),
        (one_shard_of_three, "1 of 3 files are there: model-00001-of-00003.safetensors"),
        (empty_pickle, "pytorch_model.bin is damaged"),
        (half_a_pickle, "pytorch_model.bin is damaged"),
        (without_weights, r"no weights \("),
        (without_tokenizer, "its vocabulary cannot be compared|has another vocabulary"),
        (too_small, "has an embedding of 600 tokens, the policy's last is 634"),
        (of_another_base, "is an adapter of some/base, the policy is "),
        (cut_off, "was cut off while being saved"),
        (lambda folder: (folder / "config.json").unlink(), "has neither config.json nor adapter_config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_teacher_that_cannot_teach_is_refused_before_weights_are_loaded(recipe, tmp_path, spoil, says):
    spoil(shutil.copytree(POLICY, tmp_path / "expert"))
    loaded = load_recipe(recipe, [*BOTH, "teachers.t.model=expert"])
    with pytest.raises(RecipeError, match=f"^teachers.t.model: .*({says})"):
        build_trainer(loaded, tmp_path / "run")


def test_of_a_run_the_final_weights_teach(tmp_path):
    shutil.copytree(POLICY, tmp_path / "run" / "final")
    found = TeacherWeights.of("t", TeacherSettings(model=str(tmp_path / "run")), base=str(POLICY))
    assert found == TeacherWeights("checkpoint", str(tmp_path / "run" / "final"))


def test_weights_that_pytorch_wrote_before_it_zipped_them_are_whole(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert lacking(tmp_path, FILES["config.json"]) == ""


def test_a_row_that_its_teacher_cannot_read_is_refused_before_weights_are_loaded(recipe, tmp_path):
    loaded = load_recipe(recipe, [*BOTH, "teachers.t.context='{proof}'"])
    with pytest.raises(RecipeError, match="row 'train-0' has no field 'proof'"):
        build_trainer(loaded, tmp_path / "run")
    loaded = load_recipe(recipe, [*BOTH, f"teachers.t.context='{{prompt}}{' fox' * 400}'"])
    with pytest.raises(RecipeError, match=r"^teachers.t: domains.sums.train: row 1 .* tokens to read and 8 to score"):
        build_trainer(loaded, tmp_path / "run")


def test_padding_is_no_difference_of_vocabularies(tmp_path):
    ours = AutoTokenizer.from_pretrained(POLICY)
    theirs = AutoTokenizer.from_pretrained(POLICY, pad_token="<|end|>")
    assert ours.pad_token != theirs.pad_token
    assert differing(ours, theirs) == ""


def test_a_teacher_that_fails_rarely_stops_no_run_however_large_its_draws():
    lesson = SimpleNamespace(of_domain={"a": "t"})
    distil = Distil(DistilSettings(), SimpleNamespace(lesson=lesson), domains=("a",), loss_type="grpo")
    row = torch.zeros(1, len(COLUMNS), dtype=torch.float64)
    row[0, COLUMNS.index("taught")], row[0, COLUMNS.index("missing")] = 998, 26
    distil._factors = {"a": 1.0}
    for _ in range(3):
        distil._see(row)
    other = Distil(DistilSettings(), distil.teachers, domains=("a",), loss_type="grpo")  # of a resume
    other.load_state_dict(json.loads(json.dumps(distil.state_dict())))
    assert other._missing == distil._missing and distil._missing["a"]
    row[0, COLUMNS.index("taught")], row[0, COLUMNS.index("missing")] = 100, 156
    with pytest.raises(RuntimeError, match="on 156 of the last 256 completions"):
        distil._see(row)


def telling(told, **of_domain):
    """Teachers that say this."""
    accelerator = SimpleNamespace(reduce=lambda values, reduction: values)
    policy = SimpleNamespace(trainer=SimpleNamespace(accelerator=accelerator))
    return SimpleNamespace(logps=lambda rows: told, policy=policy, lesson=SimpleNamespace(of_domain=of_domain))


def test_what_a_scheduler_hears_of_a_lesson_is_what_is_learned_from():
    told = [torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-3.0])]
    distil = Distil(DistilSettings(reward_weight=2), telling(told, a="t", b="t"), domains=("a", "b"), loss_type="dapo")
    rows = [
        Completion(ids=(1,) * n, prompt=Prompt(domain=name, id="1", prompt="?")) for name, n in (("a", 3), ("b", 1))
    ]
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    learned = distil(torch.tensor([0.5, 0.25]), torch.full((2, 3), -2.0), mask, rows)
    # a: (1 + 2 x .5) x (1/2) / (3/4); b: (-1 + 2 x .25) x (1/2) / (1/4)
    assert learned.advantages.tolist() == [pytest.approx([4 / 3] * 3), pytest.approx([-1, 0, 0])]
    assert learned.lessons["a"].abs_advantage == pytest.approx(4 / 3)
    assert learned.lessons["b"].abs_advantage == pytest.approx(1)


def test_a_token_that_a_teacher_never_says_is_clipped_and_the_row_is_kept():
    prompt = Prompt(domain="a", id="1", prompt="?")
    told = [torch.tensor([-1.0, -math.inf, -1.0]), torch.tensor([-1.0, math.nan, -1.0])]
    distil = Distil(DistilSettings(), telling(told, a="t"), domains=("a",), loss_type="grpo")
    old, rows = torch.full((2, 3), -2.0), [Completion(ids=(1, 2, 3), prompt=prompt)] * 2
    learned = distil(torch.zeros(2), old, torch.ones(2, 3, dtype=torch.long), rows)
    assert learned.advantages.tolist() == [[1.0, -5.0, 1.0], [0.0, 0.0, 0.0]]
    assert learned.lessons["a"].kl == pytest.approx((-1 + 5 - 1) / 3)
    assert distil.flush()["distil/a/missing"] == 1


def test_what_only_samples_needs_no_teacher(tmp_path):
    fields = {"t": {"model": "lab/nowhere"}}
    loaded = untaught(recipe_of(tmp_path, fields, "grpo.num_generations=1", a=("arithmetic", "t")))
    assert (loaded.algorithm, loaded.teachers, loaded.domains["a"].teacher) == ("grpo", {}, None)
    assert grpo_config(loaded, tmp_path / "run").num_generations == 2


def test_a_probe_of_distillation_is_refused_before_weights_load(tmp_path):
    recipe = recipe_of(tmp_path, {"t": {"model": "self@start"}}, a=("arithmetic", "t"), b=("strings", "t"))
    with pytest.raises(RecipeError, match="algorithm: distil: a probe trains each domain by its own reward"):
        probe(recipe, tmp_path / "probe")
    assert not (tmp_path / "probe").exists()
