from __future__ import annotations

import pytest

from polyphony.launch.build import missing_names
from polyphony.launch.grpo_fields import GRPO_KINDS, MEANT, OURS
from polyphony.launch.recipe import Recipe, RecipeError, load_recipe

RECIPE = """
name: two
model: org/name
domains:
  math: {kind: structured, train: math.jsonl, heldout: {path: held.jsonl, limit: 5}, reward: exact}
  watched: {kind: open_ended, heldout: "hf://org/rows", reward: "pkg.module:f"}
grpo: {learning_rate: 1e-6, max_steps: 3}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_yaml_1_2_reads_1e_6_as_a_number(recipe_file):
    assert load_recipe(recipe_file).grpo["learning_rate"] == 0.000001


def test_paths_are_relative_to_the_recipe(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    assert recipe.domains["math"].train == str(tmp_path / "math.jsonl")
    assert recipe.domains["math"].heldout == {"path": str(tmp_path / "held.jsonl"), "limit": 5}
    assert recipe.domains["watched"].heldout == "hf://org/rows"


def test_overrides_win_and_are_typed_like_yaml(recipe_file):
    recipe = load_recipe(recipe_file, ["grpo.max_steps=7", "eval.every=2", "tracking.wandb.mode=online"])
    assert recipe.grpo["max_steps"] == 7
    assert recipe.eval.every == 2
    assert recipe.tracking.wandb.mode == "online"


def test_a_resolved_recipe_reads_back_as_itself(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["probe.from=base"])
    (tmp_path / "resolved.yaml").write_text(recipe.as_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_a_list_of_rewards_stands_for_their_weighted_sum(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file, ["domains.math.reward=[math, {name: repetition, n: 2, weight: .1}]"])
    parts = {"math": {"reward": "math", "weight": 1.0}}
    parts |= {"repetition": {"reward": {"name": "repetition", "n": 2}, "weight": 0.1}}
    assert recipe.domains["math"].reward == {"name": "weighted", "parts": parts}
    (tmp_path / "resolved.yaml").write_text(recipe.as_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("domains.math.reward=[]", "domains.math.reward: expected at least one reward in the list, got []"),
        (
            "domains.math.reward=[math, {name: exact, weight: x}]",
            "domains.math.reward: 1.weight: 'x' is no finite number, got ['math', {'name': 'exact', 'weight': 'x'}]",
        ),
        ("nam=x", "unknown key 'nam'; did you mean 'name'?"),
        ("domains.math.kin=x", "unknown key 'domains.math.kin'; did you mean 'kind'?"),
        ("eval.evry=3", "unknown key 'eval.evry'; did you mean 'every'?"),
        ("probe.form=base", "unknown key 'probe.form'; did you mean 'from'?"),
        ("tracking.wandb.mod=offline", "unknown key 'tracking.wandb.mod'; did you mean 'mode'?"),
        ("grpo.learning_rat=1", "unknown key 'grpo.learning_rat'; did you mean 'learning_rate'?"),
        ("grpo.save_steps=1", "grpo.save_steps is set by Polyphony: use checkpoint.every"),
        (
            "grpo={use_cpu: true, deepspeed: zero2.json}",
            "grpo.use_cpu makes accelerate drop DeepSpeed without a word: leave out one of the two",
        ),
        ("domains.math.kind=poem", "domains.math.kind: Input should be 'structured' or 'open_ended', got 'poem'"),
        ("eval.every=0", "eval.every: Input should be greater than or equal to 1, got 0"),
        ("pool={look: 8}", "pool.look: must be below num_generations=8, got 8"),
        ("domains.new={}", "domains.new.kind: required, but not given"),
        ("eval.every=true", "eval.every: Input should be a valid integer, got True"),
        ("eval.every='3'", "eval.every: Input should be a valid integer, got '3'"),
        ("faults.grace_s='3'", "faults.grace_s: Input should be a valid number, got '3'"),
        ("grpo.learning_rate=.inf", "grpo.learning_rate must be a finite number, got inf"),
        ("domans={}", "unknown key 'domans'; did you mean 'domains'?"),
        ("max_steps=3", "unknown key 'max_steps'; did you mean 'grpo.max_steps'?"),
        ("lr=1e-6", "unknown key 'lr'; did you mean 'grpo.learning_rate'?"),
        ("grpo.lr=1e-6", "unknown key 'grpo.lr'; did you mean 'learning_rate'?"),
        ("grpo.kl_coef=0", "unknown key 'grpo.kl_coef'; did you mean 'beta'?"),
        ("grpo.Learning-Rate=1e-6", "unknown key 'grpo.Learning-Rate'; did you mean 'learning_rate'?"),
        ("grpo.eval_every=5", "unknown key 'grpo.eval_every'; did you mean 'eval.every'?"),
        ("reward=exact", "unknown key 'reward'; did you mean 'domains.<name>.reward'?"),
        (
            "grpo.max_prompt_length=512",
            "unknown key 'grpo.max_prompt_length'; TRL has it no more: no prompt is cut, one that does not fit into the "
            "context is refused",
        ),
        ("grpo.beta=-1", "grpo.beta must be at least 0, got -1"),
        ("grpo.epsilon=-0.2", "grpo.epsilon must be at least 0, got -0.2"),
        ("grpo.max_steps=0", "grpo.max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        ("grpo.max_steps=-5", "grpo.max_steps must be at least 1, or -1 for num_train_epochs, got -5"),
        ("grpo.temperature=.inf", "grpo.temperature must be a finite number, got inf"),
        ("grpo.temperature=1e300", "grpo.temperature must be at most 1,000,000,000, got 1e+300"),
        ("grpo.top_p=0", "grpo.top_p must be in (0, 1], got 0"),
        ("entropy.max_coefficient=.inf", "entropy.max_coefficient: Input should be a finite number, got inf"),
        ("entropy.band=[0.5, 1e308]", "entropy.band: expected multiples 0 <= low < 1 < high <= 1000 of the base "),
        ("faults.grace_s=.inf", "faults.grace_s: Input should be a finite number, got inf"),
        ("faults.grace_s=1e300", "faults.grace_s: Input should be less than or equal to 1000000000, got 1e+300"),
        ("checkpoint.keep=true", "checkpoint.keep: Input should be a valid integer, got True"),
        ("rft.accept_from=true", "rft.accept_from: Input should be a valid number, got True"),
        ("domains.math.weight=1e308", "domains.math.weight: Input should be less than or equal to 1000000000, "),
        ("model=''", "model: expected a name on the Hugging Face hub, or a folder, got ''"),
        ('model="a\\0b"', "model: expected a name on the Hugging Face hub, or a folder, got 'a\\x00b'"),
        ("name=a..b", "name: a run's folder is called so: "),
        ("pool.start=x", "unknown key 'pool.start'; known: "),
        ("probe.start=base", "unknown key 'probe.start'; "),
        ("probe.learning_rates=[0]", "probe.learning_rates: expected learning rates above 0, at most 1, got [0]"),
        ("probe.learning_rates=1e-4", "probe.learning_rates: Input should be a valid list, got 0.0001"),
        ("probe.keep=lst", "probe.keep: Input should be 'last', got 'lst'; did you mean 'last'?"),
        ("domains.math.heldout=null", "domains.math.heldout: expected rows to be scored on, got None"),
        ("cluster.slurm.time=later", "cluster.slurm.time: expected minutes, hours:minutes:seconds or days-hours, "),
        ("name=../../x", "name: a run's folder is called so: "),
        ('name="a\\0b"', "name: a run's folder is called so: "),
        ("name=<b>", "name: a run's folder is called so: "),
        ("name", "override 'name': expected key.path=value"),
        ("name.x=1", "override 'name.x=1': 'name' is a value, not a section"),
    ],
)
def test_a_wrong_key_is_named_with_its_path_and_what_was_meant(recipe_file, override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, [override])
    assert str(error.value) == message or (message.endswith(" ") and str(error.value).startswith(message))
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_is_found_at_once_and_what_follows_from_it_is_not_said(recipe_file):
    wrong = ["domains.math.reward=5", "eval.every=0", "grpo.lr=1", "grpo.beta=-1", "guardrails.math.max_drop=0.1", "x"]
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe_file, wrong)
    first, *rest = error.value.problems
    assert (str(error.value), first) == ("override 'x': expected key.path=value",) * 2
    assert [said.partition(" got ")[0].partition(";")[0] for said in rest] == [
        "domains.math.reward: expected a name, pkg.module:name, or a mapping with `name`,",
        "eval.every: Input should be greater than or equal to 1,",
        "unknown key 'grpo.lr'",
        "grpo.beta must be at least 0,",
    ]
    assert list(error.value.rest.domains) == ["watched"]


def test_every_other_name_of_a_key_leads_to_one_that_exists():
    keys = {path for path in MEANT.values() if "." not in path}
    assert keys <= set(GRPO_KINDS) | set(Recipe.model_fields)
    assert not set(MEANT) & (set(GRPO_KINDS) - set(OURS))


def test_broken_yaml_is_named_with_its_line(tmp_path):
    (tmp_path / "r.yaml").write_text("name: x\ndomains: {a: [}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: "):
        load_recipe(tmp_path / "r.yaml")


def test_a_key_given_twice_is_an_error(tmp_path):
    (tmp_path / "r.yaml").write_text("name: x\nname: y\n")
    with pytest.raises(RecipeError, match="duplicate key"):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"no\.yaml does not exist"):
        load_recipe(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("curriculum.schedular=adaptive", "curriculum: Auto: unknown key 'schedular'; did you mean 'scheduler'?"),
        ("curriculum.trasnfer=x", "did you mean 'transfer'?"),
        ("curriculum.order=[sums]", "Auto: unknown key 'order'; it belongs to sequential, e2h"),
        ("curriculum.scheduler=adaptve", "did you mean 'adaptive'?"),
        ("curriculum.replay={fractoin: 0.1}", "unknown key 'replay.fractoin'; did you mean 'fraction'?"),
        ("domains.sums.reward=exat", "domains.sums.reward: reward 'exat' does not exist; did you mean 'exact'?"),
        ("domains.sums.reward={name: judge, modle: m}", "unknown argument 'modle'; did you mean 'model'?"),
        ("domains.sums.reward={name: code, limits: {wal_s: 3}}", "unknown argument 'wal_s'; did you mean 'wall_s'?"),
        ("domains.sums.reward={name: weighted, parts: {a: {reward: mth}}}", "did you mean 'math'?"),
        ("domains.sums.diversity={partitioner: exat, shape: [1, 0]}", "did you mean 'exact'?"),
        ("domains.sums.diversity={shape: [1, 0], distance: clases}", "did you mean 'classes'?"),
        ("domains.sums.train={path: sums-train.jsonl, lmit: 3}", "unknown key 'lmit'; did you mean 'limit'?"),
        ("domains.sums.train=[sums-train.jsonl, sums-trian.jsonl]", "did you mean 'sums-train.jsonl'?"),
        ("domains.sums.tran=x", "unknown key 'domains.sums.tran'; did you mean 'train'?"),
        ("domains.sums.eval=x", "did you mean 'heldout'?"),
        ("domains.sums.kind=openended", "did you mean 'open_ended'?"),
        ("domans.sums=1", "unknown key 'domans'; did you mean 'domains'?"),
        ("rollouts.engine=vlm", "did you mean 'vllm'?"),
        ("pool.sampling=thomson", "did you mean 'thompson'?"),
        ("rft.dedup=exat", "rft.dedup: partitioner 'exat' does not exist; did you mean 'exact'?"),
        ("grpo.lr=1e-5", "did you mean 'learning_rate'?"),
        ("grpo.max_prompt_length=9", "TRL has it no more: "),
        ("grpo.loss_type=dapoo", "did you mean 'dapo'?"),
        ("eval.evry=2", "did you mean 'every'?"),
        ("cluster.strategy=fdsp", "did you mean 'fsdp'?"),
        ("guardrails.sum.max_drop=0.1", "unknown domain 'guardrails.sum'; did you mean 'sums'?"),
    ],
)
def test_a_misspelt_name_leads_to_the_one_that_was_meant(recipe, wrong, said):
    try:
        found = missing_names(load_recipe(recipe, [wrong]))
    except RecipeError as error:
        problems = list(error.problems)
    else:
        problems = [line for lines in found.values() for line in lines]
    assert len(problems) == 1 and said in problems[0], problems


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora={r: 2}"], "adapter and lora exclude each other: one adapter is trained"),
        (["cluster.strategy=zero3"], "adapter.kind osf with cluster.strategy=zero3: .* needs ddp"),
        (["adapter.kind=oft"], "adapter.kind"),
        (["adapter.frozen=1.0"], "adapter.frozen"),
    ],
)
def test_another_adapter_stands_in_loras_place(recipe, overrides, message):
    assert load_recipe(recipe, ["adapter={kind: osf}"]).adapter.frozen == 0.5
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, ["adapter={kind: osf}", *overrides])
