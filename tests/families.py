"""Tiny random models of many families: each family's configuration class, and a tokenizer of the family's shape.

What differs is what has gone wrong: tied and untied heads, vocabularies padded beyond the tokenizer, several tokens that end
a completion, no pad token, no first token, dropout, norms around zero, experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
SPOKEN = [f"What is {a} + {b} ? It is {a + b} ." for a in range(12) for b in range(12)]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
OF_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
GEMMA = {**SIZES, "sliding_window": 32, "query_pre_attn_scalar": 32}
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaModel):
    config_class = OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
PADDED = 384
"""Rows of a vocabulary that is larger than the tokenizer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family, as small as vLLM's CPU build takes it (heads of 32)."""

    config: str
    """Its configuration class in Transformers."""
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    tied: bool = False
    vocabulary: int | None = None
    """Rows of the embedding; None: as many as the tokenizer has tokens."""
    bos: str | None = None
    """Begins every prompt."""
    ends: Sequence[str] = ("<|endoftext|>",)
    """What ends a completion: the tokenizer's own first, the others named in the generation config alone."""
    pad: str | None = None
    is_chat: bool = False
    has_own_code: bool = False
    """Its classes are in its folder (`trust_remote_code`)."""

    def make(self, folder: Path) -> Path:
        """Write model and tokenizer into a folder, for `from_pretrained`."""
        tokenizer = self._tokenizer()
        tokenizer.save_pretrained(folder)
        ends = tokenizer.convert_tokens_to_ids(list(self.ends))
        tokens = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = getattr(transformers, self.config)(
            vocab_size=self.vocabulary or len(tokenizer),
            tie_word_embeddings=self.tied,
            eos_token_id=ends[0],
            **tokens,
            **self.sizes,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config)
        model.generation_config = GenerationConfig(eos_token_id=ends if len(ends) > 1 else ends[0], **tokens)
        model.save_pretrained(folder)
        if self.has_own_code:
            _bring_code(folder)
        return folder

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        special = dict.fromkeys(t for t in (self.bos, *self.ends, self.pad, *self._framing) if t)
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=list(special), initial_alphabet=letters, show_progress=False
        )
        made.train_from_iterator(SPOKEN, trainer)
        if self.bos:
            first = (self.bos, made.token_to_id(self.bos))
            made.post_processor = processors.TemplateProcessing(single=f"{self.bos} $A", special_tokens=[first])
        named = {"bos_token": self.bos, "eos_token": self.ends[0], "pad_token": self.pad}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **named)
        if self.is_chat:
            tokenizer.chat_template = CHAT
        return tokenizer

    @property
    def _framing(self) -> tuple[str, ...]:
        return ("<|im_start|>", "<|im_end|>") if self.is_chat else ()

    @property
    def shape(self) -> str:
        """In words, what of it differs from others."""
        said = ["tied" if self.tied else "untied"]
        said += ["padded"] if self.vocabulary else []
        said += [] if self.bos else ["no BOS"]
        said += [f"{len(self.ends)} EOS"] if len(self.ends) > 1 else []
        said += ["no pad"] if self.pad is None else ["pad is EOS"] if self.pad in self.ends else []
        said += ["chat"] if self.is_chat else []
        said += ["code of its own"] if self.has_own_code else []
        return ", ".join(said)


def _bring_code(folder: Path) -> None:
    (folder / "own.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    named = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    _change(folder / "config.json", named)
    tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    _change(folder / "tokenizer_config.json", tokenizer)


def _change(path: Path, changes: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _without(*names: str, **more: Any) -> dict[str, Any]:
    return {name: value for name, value in SIZES.items() if name not in names} | more


FAMILIES = {
    "llama": Family(
        config="LlamaConfig", bos="<|begin_of_text|>", ends=("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")
    ),
    "own": Family(config="LlamaConfig", pad="<|pad|>", has_own_code=True),
    "qwen2": Family(
        config="Qwen2Config",
        sizes=_without("head_dim"),
        tied=True,
        vocabulary=PADDED,
        ends=("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>",
        is_chat=True,
    ),
    "qwen3": Family(config="Qwen3Config", vocabulary=PADDED, ends=("<|im_end|>",), pad="<|endoftext|>", is_chat=True),
    "gemma2": Family(config="Gemma2Config", sizes=GEMMA, tied=True, bos="<bos>", ends=("<eos>",), pad="<pad>"),
    "gemma3": Family(
        config="Gemma3TextConfig", sizes=GEMMA, tied=True, bos="<bos>", ends=("<eos>", "<end_of_turn>"), pad="<pad>"
    ),
    "mistral": Family(config="MistralConfig", sizes={**SIZES, "sliding_window": 32}, bos="<s>", ends=("</s>",)),
    "phi3": Family(
        config="Phi3Config",
        sizes=_without("head_dim"),
        vocabulary=PADDED,
        ends=("<|endoftext|>", "<|end|>", "<|assistant|>"),
        pad="<|endoftext|>",
    ),
    "granite": Family(
        config="GraniteConfig",
        sizes=_without(
            "head_dim",
            embedding_multiplier=12.0,
            attention_multiplier=0.03,
            residual_multiplier=0.22,
            logits_scaling=8.0,
        ),
        tied=True,
        ends=("<|end_of_text|>",),
        pad="<|end_of_text|>",
    ),
    "olmo2": Family(config="Olmo2Config", sizes=_without("head_dim"), vocabulary=PADDED, pad="<|pad|>", is_chat=True),
    "smollm3": Family(
        config="SmolLM3Config",
        sizes=_without("head_dim", num_hidden_layers=4, no_rope_layer_interval=4),
        tied=True,
        ends=("<|im_end|>",),
        is_chat=True,
    ),
    "gpt2": Family(config="GPT2Config", sizes=OF_GPT2, tied=True),
    "gpt_neox": Family(
        config="GPTNeoXConfig", sizes=_without("head_dim", "num_key_value_heads"), vocabulary=PADDED, pad="<|padding|>"
    ),
    "opt": Family(
        config="OPTConfig",
        sizes=_without("head_dim", "num_key_value_heads", "intermediate_size", ffn_dim=128, word_embed_proj_dim=64),
        tied=True,
        bos="</s>",
        ends=("</s>",),
        pad="<pad>",
    ),
    "qwen3_moe": Family(
        config="Qwen3MoeConfig",
        sizes={**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        vocabulary=PADDED,
        ends=("<|im_end|>",),
        pad="<|endoftext|>",
        is_chat=True,
    ),
    "gpt_oss": Family(
        config="GptOssConfig",
        sizes={
            **SIZES,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 32,
            "intermediate_size": 64,
        },
        vocabulary=PADDED,
        ends=("<|return|>", "<|call|>"),
        pad="<|endoftext|>",
    ),
}
