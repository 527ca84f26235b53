"""TRL's own signature: every argument has a place, rows become domains, rewards are weighed as TRL weighs them."""

from __future__ import annotations

import copy
import inspect
import json
import shutil
from types import SimpleNamespace

import pandas
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, IterableDataset
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from polyphony.trainer import from_trl
from polyphony.trainer.arguments import OF_TRAINER
from polyphony.trainer.domains import DomainData
from polyphony.trainer.evaluation.evaluator import Evaluator
from polyphony.trainer.from_trl import Script, arguments_of
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.reward_model import RewardModel
from polyphony.trainer.scoring import Scorer
from tests.conftest import POLICY


def right(completions, solution, **columns):
    return [float(text == answer) for text, answer in zip(completions, solution, strict=True)]


def only_odd(prompts, completions, completion_ids, solution, trainer_state, log_extra, log_metric):
    """TRL's strict form, without `**kwargs`; says nothing of rows that it is not for."""
    return [-1.0 if int(answer) % 2 else None for answer in solution]


def rows(first: int, count: int, **columns) -> list[dict]:
    return [{"prompt": f"{i} + 1 =", "solution": str(i + 1), **columns} for i in range(first, first + count)]


@pytest.fixture
def args(tmp_path):
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8, "max_steps": 2}
    return GRPOConfig(output_dir=str(tmp_path), bf16=False, **sizes)


def test_every_argument_of_trls_trainer_has_its_place_and_is_in_the_table():
    of_trl = list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]
    assert list(OF_TRAINER) == of_trl, "say in trainer/arguments.py what becomes of it"
    ours = list(inspect.signature(DomainGRPOTrainer.__init__).parameters)[1:]
    assert ours[: len(of_trl)] == of_trl


def test_a_column_says_each_rows_domain_and_a_dict_the_held_out_rows(args):
    train = Dataset.from_list([*rows(0, 4, domain="math"), *rows(10, 2, domain="code"), *rows(20, 1, domain="math")])
    script = Script(reward_funcs=right, train_dataset=train, eval_dataset={"math": rows(30, 2), "safety": rows(40, 3)})
    found = {domain.name: domain for domain in script.domains(args, evaluates=False)}
    sizes = {name: (len(d.train or []), len(d.heldout or [])) for name, d in found.items()}
    assert sizes == {"math": (5, 2), "code": (2, 0), "safety": (0, 3)}
    assert [row["solution"] for row in found["math"].train] == ["1", "2", "3", "4", "21"]
    assert found["safety"].is_watch_only and found["math"].reward.rewards == {"right": right}


def test_rows_are_held_out_only_where_something_evaluates_and_it_is_said(args, capsys):
    script = Script(reward_funcs=right, train_dataset=rows(0, 40), name="sums")
    (plain,) = script.domains(args, evaluates=False)
    assert (len(plain.train), plain.heldout, capsys.readouterr().err) == (40, None, "")
    (first,), (again,) = (script.domains(args, evaluates=True) for _ in range(2))
    assert (len(first.train), len(first.heldout)) == (24, 16)
    assert first.heldout == again.heldout and not [row for row in first.heldout if row in first.train]
    assert "domain 'sums': 16 of 40 rows are held out, by their prompts" in capsys.readouterr().err


def test_rows_that_say_the_same_are_all_trained_on_and_none_need_be_held_out(args):
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    script = Script(reward_funcs=right, train_dataset=Dataset.from_list(rows(1, 2) * 3))
    own = script.domains(args, evaluates=False)
    data = DomainData.load(own, tokenizer=tokenizer, args=args, as_trl={"default"})
    assert (data.n_train, data.heldout) == (6, {})
    (prompt, *_) = data.tokenized(data.train["default"])
    assert prompt.ids == tokenizer("1 + 1 =")["input_ids"]  # text is asked as it stands
    with pytest.raises(ValueError, match="'default' has no `heldout` rows"):
        DomainData.load(own, tokenizer=tokenizer, args=args)


def test_of_a_stream_the_first_rows_are_read_and_it_is_said(args, capsys, monkeypatch):
    monkeypatch.setattr(from_trl, "MOST_READ", 5)
    for stream in (iter(rows(0, 9)), IterableDataset.from_generator(lambda: iter(rows(0, 9)))):
        (domain,) = Script(reward_funcs=right, train_dataset=stream).domains(args, evaluates=False)
        assert [row["solution"] for row in domain.train] == ["1", "2", "3", "4", "5"]
        assert "train_dataset: a stream, of which the first 5 rows are read" in capsys.readouterr().err


def completion(text: str, solution: str) -> SimpleNamespace:
    columns = {"solution": solution, "answer": None}
    prompt = SimpleNamespace(domain="default", prompt="?", id="1", columns=columns)
    return SimpleNamespace(prompt=prompt, text=text, ids=[1], episode=None)


def test_rewards_are_weighed_as_by_trl_and_each_is_logged(args):
    args.reward_weights = [1.0, 0.5]
    (domain,) = Script(reward_funcs=[right, only_odd], train_dataset=rows(0, 4)).domains(args, evaluates=False)
    scorer = Scorer([domain])
    said = [completion("1", "1"), completion("2", "2"), completion("1", "3")]
    scorer.check_fit([said[0].prompt])
    assert scorer(said) == [0.5, 1.0, -0.5]
    logged = {"domain/default/logged/right": 2 / 3, "domain/default/logged/only_odd": -1.0}
    assert scorer.logged.flush("domain") == pytest.approx(logged)


def test_held_out_scores_without_a_range_are_cut_and_it_is_said_once(capsys):
    evaluator = SimpleNamespace(_cut=set())
    assert [Evaluator._within(evaluator, "math", score) for score in (0.5, -2.0, 3.0, None)] == [0.5, 0.0, 1.0, None]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("domain 'math': a held-out reward of -2: scores are cut to [0, 1]; a function's attribute")


def test_a_reward_model_scores_the_prompt_with_its_completion(args, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(POLICY, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    (domain,) = Script(reward_funcs=str(tmp_path / "judge"), train_dataset=rows(0, 4)).domains(args, evaluates=False)
    assert list(domain.reward.rewards) == ["judge"]
    texts, chat = ["1 + 1 =2", "10 + 1 =11"], [{"role": "user", "content": "1 + 1 ="}]
    found = domain.reward(["1 + 1 =", "10 + 1 ="], ["2", "11"])
    model.eval()
    alone = [model(**tokenizer(t, return_tensors="pt", add_special_tokens=False)).logits[0, 0].item() for t in texts]
    assert found == pytest.approx(alone, abs=1e-5)
    loaded = RewardModel.of(copy.deepcopy(model), tokenizer, args)
    answered = loaded([chat], [[{"role": "assistant", "content": "2"}]])
    said = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "2"}], return_tensors="pt")
    assert answered == pytest.approx([model(**said).logits[0, 0].item()], abs=1e-5)


class Game:
    def reset(self, **columns):
        return None

    def get_reward(self):
        return 1.0


def test_an_environment_may_bring_its_rows_and_several_are_routed_by_a_column(args):
    (alone,) = Script(environment_factory=Game).domains(args, evaluates=False)
    assert (len(alone.train), alone.environment, alone.reward, alone.as_chat) == (4, Game, None, True)
    both = [*rows(0, 2, environment="a"), *rows(2, 1, environment="b")]
    script = Script(environment_factory={"a": Game, "b": dict}, train_dataset=both)
    found = script.domains(args, evaluates=False)
    assert [(d.name, len(d.train), d.environment) for d in found] == [("a", 2, Game), ("b", 1, dict)]


def test_arguments_that_are_left_out_are_trls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments_of("org/small", None).output_dir == "small-GRPO"


ROWS = {"reward_funcs": right, "train_dataset": rows(0, 4)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reward_funcs": right}, "reward_funcs without train_dataset: give it, or say a domain's own in domains="),
        ({"train_dataset": rows(0, 4)}, "reward_funcs: required, unless an environment_factory rewards"),
        (ROWS | {"reward_processing_classes": [None, None]}, "reward_processing_classes: 2 for 1 reward functions"),
        (ROWS | {"reward_funcs": [right, 3]}, "reward_funcs: expected functions, models or names of models, got 3"),
        (ROWS | {"reward_funcs": "/no/such/model"}, "reward_funcs: model '/no/such/model' cannot be loaded"),
        (
            ROWS | {"train_dataset": DatasetDict(a=Dataset.from_list(rows(0, 2)))},
            r"splits a: give train_dataset\['a'\]",
        ),
        (ROWS | {"train_dataset": "rows.jsonl"}, "train_dataset: expected a Dataset, a list of rows, or an iterable"),
        (
            ROWS | {"train_dataset": rows(0, 1, domain=3)},
            "train_dataset: row 1: column `domain` names its domain, got 3",
        ),
        (
            {**ROWS, "train_dataset": rows(0, 2, domain="a"), "eval_dataset": rows(4, 2)},
            "eval_dataset: its rows have no column `domain`, to say which is of a",
        ),
        (ROWS | {"train_dataset": rows(0, 1) * 9}, "too few different prompts to hold some out .* give eval_dataset"),
        (
            ROWS | {"environment_factory": {"a": Game}},
            "train_dataset: no column `environment`, which names each row's: a",
        ),
        (
            ROWS | {"environment_factory": {"a": Game}, "train_dataset": rows(0, 2, environment="b")},
            "column `environment` is 'b', expected one of a",
        ),
        (
            ROWS | {"train_dataset": [*rows(0, 1), *rows(1, 1, domain="a")]},
            "train_dataset: row 1: column `domain` names its domain, got None",
        ),
        (
            ROWS | {"train_dataset": [*rows(0, 1, domain="a"), *rows(1, 1)]},
            "train_dataset: row 2: column `domain` names its domain, got None",
        ),
        (ROWS | {"train_dataset": ["a", "b"]}, "train_dataset: row 1: expected an object with a `prompt`, got 'a'"),
        (ROWS | {"reward_funcs": torch.nn.Linear(2, 2)}, "reward_funcs: expected a model of Transformers, got Linear"),
        (ROWS | {"reward_funcs": Game}, "reward_funcs: got the class Game: give one that is made"),
        (
            ROWS | {"reward_funcs": "math"},
            r"'math' is a reward of ours, .* give polyphony.rewards.find_reward\('math'\)",
        ),
    ],
)
def test_what_makes_no_domains_is_refused_in_one_line(args, given, message):
    with pytest.raises(ValueError, match=message):
        script = Script(**given)
        assert script.is_given
        script.domains(args, evaluates=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"eval_dataset": {"easy": rows(50, 3)}, "engine": "transformers", "run": "runs/x"},
            "eval_dataset: has no rows of domain 'default', which run= measures; it has easy: call one of them so",
        ),
        (
            {"args": Dataset.from_list(rows(0, 2))},
            "args: expected a GRPOConfig, got Dataset: give rows as train_dataset=",
        ),
        (
            {"reward_funcs": Dataset.from_list(rows(0, 2))},
            "reward_funcs: got rows, a Dataset: give them as train_dataset=",
        ),
        (
            {"reward_funcs": GRPOConfig(bf16=False)},
            "args: two stand for it, a GRPOConfig second and a GRPOConfig third",
        ),
        (
            {"train_dataset": {"prompt": ["1"]}},
            r"train_dataset: expected rows, got columns prompt: give Dataset.from_dict",
        ),
        (
            {"train_dataset": pandas.DataFrame(rows(0, 2))},
            r"train_dataset: .* a table of pandas: give Dataset.from_pandas",
        ),
        (
            {"reward_funcs": lambda completions: [0.0], "engine": "transformers"},
            "reward: lambda: got an unexpected keyword argument",
        ),
        ({"args": {"max_steps": 2}}, r"args: expected a GRPOConfig, got dict: give GRPOConfig\(\*\*args\)"),
        ({"args": TrainingArguments(use_cpu=True)}, "args: expected a GRPOConfig, got TrainingArguments"),
        ({"tools": right}, "tools: expected a list of functions, got function right"),
        ({"tools": [right, 3]}, "tools: expected functions, got 3 among them"),
        ({"environment_factory": 3}, "environment_factory: expected a class, or a function that .*, got 3"),
        ({"environment_factory": {"a": "b"}}, r"environment_factory\['a'\]: expected a class, .*, got 'b'"),
        ({"train_dataset": [{"solution": "1"}]}, "^train_dataset: row 1 has no `prompt`"),
        (
            {"train_dataset": rows(0, 4, image="cat.png")},
            "^train_dataset: row 1: column 'image': the policy reads text",
        ),
        ({"tools": [right]}, "^tools: tool 'right': Cannot generate JSON schema"),
        ({"quantization_config": object()}, "quantization_config with engine='vllm': it would sample from weights"),
        (
            {"quantization_config": object(), "engine": "transformers", "run": "runs/x"},
            "quantization_config with run=: its final/ is merged",
        ),
        ({"processing_class": object()}, "processing_class: expected a tokenizer, for text alone, got object"),
    ],
)
def test_what_would_not_be_heard_of_trls_arguments_is_refused(args, given, message):
    with pytest.raises(ValueError, match=message):
        DomainGRPOTrainer(str(POLICY), **{"args": args, **ROWS, **given})


@pytest.mark.parametrize("with_run", [True, False])
def test_a_policy_is_quantized_by_any_of_four_ways_and_refused_alike(args, tmp_path, with_run):
    given = {"run": tmp_path / "run", **ROWS} if with_run else ROWS
    what = "its final/ is merged" if with_run else "it would sample from weights that are not quantized"
    folder = tmp_path / "packed"
    shutil.copytree(POLICY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(
        ValueError, match=rf"^model .*packed, whose config.json says quantization_config \(awq\), with .*: {what}"
    ):
        DomainGRPOTrainer(str(folder), args=args, **given)
    with pytest.raises(ValueError, match=f"^quantization_config with .*: {what}"):
        DomainGRPOTrainer(str(POLICY), args=args, quantization_config=object(), **given)
    with pytest.raises(ValueError, match=f"^model, which is quantized, with .*: {what}"):
        DomainGRPOTrainer(SimpleNamespace(is_loaded_in_4bit=True, name_or_path="x"), args=args, **given)
    args.model_init_kwargs = {"quantization_config": object()}
    with pytest.raises(ValueError, match=rf"^args.model_init_kwargs\['quantization_config'\] with .*: {what}"):
        DomainGRPOTrainer(str(POLICY), args=args, **given)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model: expected a name, a folder or a model that is loaded, got None"),
        (POLICY, r"model: expected a name, .* got PosixPath.*: give str\(..\) of it"),
        ("./nope", "model './nope': no such folder"),
    ],
)
def test_what_is_no_model_is_told_before_anything_is_read(args, model, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        DomainGRPOTrainer(model, args=args, **ROWS)


def test_a_held_out_domain_that_is_nearly_a_trained_one_is_told(args, capsys):
    train = [*rows(0, 20, domain="math"), *rows(20, 20, domain="code")]
    Script(reward_funcs=right, train_dataset=train, eval_dataset={"mth": rows(90, 2)}).domains(args, evaluates=True)
    assert "no training row is of domain 'mth', which is watched alone; did you mean 'math'?" in capsys.readouterr().err


def test_what_trl_called_otherwise_is_named_as_it_is_now(args):
    with pytest.raises(TypeError, match="no argument 'tokenizer'; did you mean 'processing_class'"):
        DomainGRPOTrainer(str(POLICY), right, args, tokenizer=None)


def test_an_argument_that_there_is_not_is_named_with_the_nearest(args):
    with pytest.raises(
        TypeError, match=r"^DomainGRPOTrainer has no argument 'train_datasets'; did you mean 'train_dataset'\?"
    ):
        DomainGRPOTrainer(str(POLICY), right, args, train_datasets=rows(0, 4))


def test_a_loaded_reward_model_without_a_name_needs_its_tokenizer(args):
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(POLICY, num_labels=1))
    model.config._name_or_path = ""
    with pytest.raises(
        ValueError, match=r"^reward_funcs: a loaded .* has no tokenizer: give reward_processing_classes"
    ):
        RewardModel.of(model, None, args)


@pytest.mark.parametrize("held", [{"easy": rows(50, 3), "hard": rows(60, 3)}, rows(50, 3, domain="easy"), rows(50, 3)])
def test_a_domain_that_is_trained_alone_gives_up_no_rows_beside_an_eval_dataset(args, held, capsys):
    script = Script(reward_funcs=right, train_dataset=rows(0, 40), eval_dataset=held)
    found = {domain.name: domain for domain in script.domains(args, evaluates=True)}
    assert len(found["default"].train) == 40 and "held out" not in capsys.readouterr().err
    assert {len(domain.heldout) for domain in found.values() if domain.heldout} == {3}


def test_a_class_label_says_a_domain_by_its_name(args):
    train = Dataset.from_list([{"prompt": str(i), "domain": i % 2} for i in range(4)])
    train = train.cast_column("domain", ClassLabel(names=["math", "code"]))
    found = Script(reward_funcs=right, train_dataset=train).domains(args, evaluates=False)
    assert [(domain.name, len(domain.train)) for domain in found] == [("math", 2), ("code", 2)]
