"""Adapters merged into copies: the base is never written; the adapter on the base from disk is what was sent and saved."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig, OSFConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig

from polyphony.curricula.records import Domain
from polyphony.trainer.checkpoints import save_final
from polyphony.trainer.engine.merge import merged_parameters, refuse_unmergeable
from polyphony.trainer.grpo import DomainGRPOTrainer
from polyphony.trainer.policy import Policy
from tests.conftest import POLICY

LAYERS = ["q_proj", "down_proj"]
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "head": {"modules_to_save": ["norm"]}}


def base(dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(POLICY, dtype=dtype)


def one_rank() -> SimpleNamespace:
    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None)
    device = torch.device("cpu")
    return SimpleNamespace(state=state, device=device, is_main_process=True, unwrap_model=lambda model: model)


def adapted(dtype: torch.dtype = torch.float32, **changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, "task_type": "CAUSAL_LM"}
    return get_peft_model(base(dtype), LoraConfig(**settings | changes))


def sent(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in merged_parameters(model, one_rank())}


def step(model) -> None:
    """Move what is trained, as an optimizer would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),  # as TRL leaves it under ZeRO-3
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_after_fifty_syncs_the_adapter_on_the_base_from_disk_is_what_was_sent(tmp_path, kind, dtype, adapter_dtype):
    torch.manual_seed(0)
    model = adapted(dtype, **KINDS[kind])
    if adapter_dtype == dtype:
        model.to(dtype)
    for _ in range(50):
        step(model)
        last = sent(model)
    on_disk, inside = (
        dict(base(dtype).named_parameters()),
        re.compile(r"^base_model\.model\.|base_layer\.|original_module\."),
    )
    frozen = {inside.sub("", name): p for name, p in model.named_parameters() if not p.requires_grad}
    assert same(frozen, on_disk)
    assert not same(last, on_disk)

    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    trainer = SimpleNamespace(accelerator=one_rank(), model=model, processing_class=tokenizer)
    save_final(SimpleNamespace(trainer=trainer), tmp_path / "final")
    assert same(load_file(tmp_path / "final" / "model.safetensors"), last)
    merged = PeftModel.from_pretrained(base(dtype), tmp_path / "final" / "adapter").merge_and_unload()
    assert same(dict(merged.named_parameters()), last)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "final").dtype == dtype


def test_orthogonal_subspaces_are_merged_into_copies_and_what_is_frozen_stays_so(tmp_path):
    """After a projected step the largest singular direction of a layer is as it was; what was sent is what is saved."""
    torch.manual_seed(0)
    settings = OSFConfig(effective_rank=0.5, target_modules=LAYERS, task_type="CAUSAL_LM")
    model, ids, start = get_peft_model(base(), settings), torch.arange(12).reshape(1, 12), base()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = sent(model)
    assert last.keys() == dict(start.named_parameters()).keys()
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(
        model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight, start.state_dict()[key]
    )
    was, new = start.state_dict()[key], last[key]
    assert not torch.allclose(was, new, atol=1e-4)
    left, size, right = torch.linalg.svd(was)
    assert torch.allclose(left[:, :64].T @ new @ right[:64].T, torch.diag(size[:64]), atol=1e-3)
    with torch.no_grad():
        start.load_state_dict(last, strict=False)
        assert torch.allclose(model(ids).logits, start(ids).logits, atol=1e-4)
    trainer = SimpleNamespace(
        accelerator=one_rank(), model=model, processing_class=AutoTokenizer.from_pretrained(POLICY)
    )
    save_final(SimpleNamespace(trainer=trainer), tmp_path / "final")
    assert same(load_file(tmp_path / "final" / "model.safetensors"), last)
    again = PeftModel.from_pretrained(base(), tmp_path / "final" / "adapter").merge_and_unload()
    assert all(torch.allclose(p, last[name], atol=1e-5) for name, p in again.named_parameters())
    refuse_unmergeable(model, one_rank())


def test_what_is_merged_is_the_policy_that_was_trained():
    torch.manual_seed(0)
    model, plain, ids = adapted(use_dora=True), base(), torch.arange(12).reshape(1, 12)
    step(model)
    plain.load_state_dict(sent(model), strict=False)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)
        assert not torch.allclose(model(ids).logits, base()(ids).logits, atol=1e-2)


def test_trls_own_engine_is_sent_copies_too():
    model = adapted()
    step(model)
    trainer = SimpleNamespace(model=model, accelerator=one_rank(), vllm_generation=SimpleNamespace())
    Policy.keep_base(SimpleNamespace(trainer=trainer))
    assert same({n: p.clone() for n, p in trainer.vllm_generation._iter_named_params()}, sent(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa': expected one that leaves the frozen base"),
        (
            {"alora_invocation_tokens": [1]},
            "layers.0.self_attn.q_proj is a ALoraLinearVariant: expected LoRA, rsLoRA or",
        ),
        (
            {"target_modules": ["embed_tokens"]},
            "model.embed_tokens.weight is shared with lm_head.weight and cannot be changed alone: leave it out of",
        ),
        ({"modules_to_save": ["embed_tokens"]}, "model.embed_tokens.weight is shared with lm_head.weight"),
        ({"trainable_token_indices": [1, 2]}, "layer model.embed_tokens.token_adapter is a .*: expected lora.Linear"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"peft_config: .*{message}"):
        refuse_unmergeable(adapted(**changes), one_rank())


def test_other_adapters_several_adapters_and_the_old_fsdp_are_refused():
    other = get_peft_model(base(), IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"]))
    with pytest.raises(ValueError, match="peft_config: peft_type=IA3: expected LORA or OSF"):
        refuse_unmergeable(other, one_rank())
    two = adapted()
    two.add_adapter("second", two.peft_config["default"])
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"active adapters \['default', 'second'\]: expected one"):
        refuse_unmergeable(two, one_rank())
    rank = one_rank()
    rank.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    with pytest.raises(ValueError, match="fsdp_version=1: expected 2"):
        refuse_unmergeable(adapted(), rank)
    refuse_unmergeable(base(), rank)
    for changes in KINDS.values():
        refuse_unmergeable(adapted(**changes), one_rank())


def test_where_nothing_is_merged_any_adapter_trains(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, max_steps=1, report_to=[])
    args.max_completion_length = 8
    rows = {
        "train": [{"prompt": "1 + 1 =", "answer": "2"}],
        "heldout": [{"prompt": f"{n} + 1 =", "answer": "3"} for n in (2, 3)],
    }
    given = {"domains": [Domain(name="sums", kind="structured", reward="exact", **rows)], "engine": "transformers"}
    given |= {"peft_config": IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"])}
    assert isinstance(DomainGRPOTrainer(str(POLICY), args, **given).model, PeftModel)
    with pytest.raises(ValueError, match="peft_config: peft_type=IA3: expected LORA or OSF"):
        DomainGRPOTrainer(str(POLICY), args, run=tmp_path / "run", **given)  # which leaves a merged policy in final/
