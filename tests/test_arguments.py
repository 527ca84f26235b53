"""What becomes of each field of TRL's GRPOConfig: every one is in a table, and what the tables say is what happens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GenerationConfig
from trl import GRPOConfig

from polyphony.curricula.records import Domain
from polyphony.trainer.arguments import DIFFERS, ENGINES_OWN, GENERATION, HEARD, UNHEARD, refuse_unheard
from polyphony.trainer.domains import DomainData, code_of
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.settings import TrainerSettings
from tests.conftest import LATER, POLICY

ROWS = [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(3)]
ENGINES = {"always": "vllm", "run": "vllm", "ours": "vllm", "transformers": "transformers", "trl": "vllm"}
OTHER = {
    "include_for_metrics": ["loss"],
    "transformers_continuous_batching_config": {"a": 1},
    "label_names": ["labels"],
    "metric_for_best_model": "loss",
    "multi_objective_aggregation": "normalize_then_sum",
    "length_column_name": "size",
    "reward_weights": [1.0],
    "train_sampling_strategy": "sequential",
    "cache_implementation": "static",
    "vllm_mode": "server",
    "vllm_server_base_url": "http://host",
    "vllm_server_host": "host",
    "vllm_model_impl": "transformers",
    "vllm_importance_sampling_mode": "token_mask",
    "vllm_structured_outputs_regex": "a+",
}


def other(name: str) -> object:
    """A value of a field that asks for something."""
    default = UNHEARD[name][0].allowed[0]
    if name in OTHER:
        return OTHER[name]
    if isinstance(default, bool) or name in ("shuffle_dataset", "greater_is_better"):
        return not (default is None or default)
    return 1 if default is None else default / 2 if isinstance(default, float) and default else default + 1


def test_every_field_of_trl_is_in_one_of_the_tables():
    fields = {field.name for field in dataclasses.fields(GRPOConfig) if field.init} - LATER
    known = HEARD | set(DIFFERS) | set(UNHEARD)
    assert fields - known == set(), "say in trainer/arguments.py what becomes of it"
    assert known - fields == set()
    assert not HEARD & (set(DIFFERS) | set(UNHEARD))


def test_what_asks_for_nothing_is_trls_default(tmp_path):
    defaults = GRPOConfig(output_dir=str(tmp_path), bf16=False)
    assert [n for n, kinds in UNHEARD.items() for k in kinds if getattr(defaults, n) not in k.allowed] == []
    for engine in ("vllm", "transformers"):
        refuse_unheard(defaults, engine=engine, has_run=True)


@pytest.mark.parametrize(
    ("name", "kind", "where"),
    [(name, kind, where) for name, kinds in UNHEARD.items() for kind in kinds for where in kind.where],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_would_not_be_heard_is_refused_in_the_words_of_the_table(tmp_path, name, kind, where):
    if name == "auto_find_batch_size":
        with pytest.raises(ValueError, match="auto_find_batch_size is not supported by GRPO"):
            GRPOConfig(output_dir=str(tmp_path), bf16=False, auto_find_batch_size=True)
        return
    given = {name: other(name), "bf16": False, "use_vllm": where == "trl"}
    given |= {"save_strategy": "no"} if name == "load_best_model_at_end" else {}
    args = GRPOConfig(output_dir=str(tmp_path), **given)
    run = str(tmp_path / "run") if where == "run" else None
    with pytest.raises(ValueError) as refused:
        DomainGRPOTrainer(str(POLICY), args, domains=[], engine=ENGINES[where], run=run)
    assert str(refused.value).startswith(f"{name}={getattr(args, name)!r}") or f"; {name}=" in str(refused.value)
    assert kind.why in str(refused.value)


def test_generation_kwargs_leave_the_engine_its_own(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, generation_kwargs=dict.fromkeys(ENGINES_OWN, 1))
    with pytest.raises(ValueError) as refused:
        refuse_unheard(args, engine="vllm", has_run=False)
    assert all(f"generation_kwargs.{name} with an engine of ours" in str(refused.value) for name in ENGINES_OWN)


def test_generation_kwargs_without_vllm_are_fields_of_transformers(tmp_path):
    given = {"stop": ["4"], "bad_words": ["5"], "num_return_sequences": 2, "no_repeat_ngram_size": 2}
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, generation_kwargs=given)
    with pytest.raises(ValueError) as refused:
        refuse_unheard(args, engine="transformers", has_run=False)
    assert [what.partition(" ")[0] for what in str(refused.value).split("; ")] == [
        f"generation_kwargs.{name}" for name in ("bad_words", "num_return_sequences", "stop")
    ]
    known = {name for name in vars(GenerationConfig()) if name[0] != "_" and name != "transformers_version"}
    assert known == GENERATION, "say in trainer/arguments.py what Transformers has now"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU could run them")
def test_kernels_of_the_hub_are_refused_where_nothing_runs_them(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, model_init_kwargs={"use_kernels": True})
    with pytest.raises(
        ValueError, match=r"^model_init_kwargs\.use_kernels=True: .* are for GPUs, .* none here; leave it out"
    ):
        DomainGRPOTrainer(str(POLICY), args, domains=[])


def test_an_engine_beside_trls_own_is_refused(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_vllm=True)
    with pytest.raises(ValueError, match="engine='pkg:Engine' and use_vllm=True exclude each other"):
        refuse_unheard(args, engine="pkg:Engine", has_run=False)


def test_arguments_of_the_chat_template_are_for_domains_that_do_not_say(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    shared = {"enable_thinking": False, "tone": "plain"}
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, max_completion_length=8, chat_template_kwargs=shared)
    rows = {"train": ROWS, "heldout": [{"prompt": f"{i} - 1 =", "answer": str(i - 1)} for i in range(3)]}
    own = {"plain": {}, "own": {"enable_thinking": True}}
    domains = [
        Domain(name=name, kind="structured", reward="exact", chat_template_kwargs=kwargs, **rows)
        for name, kwargs in own.items()
    ]
    data = DomainData.load(domains, tokenizer=tokenizer, args=args)
    assert [dict(d.chat_template_kwargs) for d in data.domains] == [shared, shared | {"enable_thinking": True}]


def test_trust_and_revision_are_those_of_the_weights(tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path), bf16=False, trust_remote_code=True, model_init_kwargs={"revision": "v2"}
    )
    assert code_of(args) == {"trust_remote_code": True, "revision": "v2"}


def test_held_out_items_are_sampled_as_often_as_num_generations_eval_says():
    settings = TrainerSettings.of(max_grader_failures=0.5)
    assert settings.with_samples(2).evaluation.samples == 2
    assert settings.with_samples(None) is settings
    with pytest.raises(ValueError, match=r"num_generations_eval=2 and evaluation.samples=8: say one"):
        TrainerSettings.of(max_grader_failures=0.5, evaluation={"samples": 8}).with_samples(2)
