"""TRL's own tests of its GRPO trainer, on TRL's trainer and on ours: `python -m tests.experiments.trl_suite CHECKOUT`.

The checkout's `tests/test_grpo_trainer.py` runs twice against the installed TRL, the second time with
`trl_shim.OneDomainTrainer` in the place of GRPOTrainer. Tests of tools and environments write Qwen's tokens down, and need
`--vocabulary 151665`. Models are tiny random ones (`trl_plugin`); nothing of the checkout
is kept but names of tests. Results go to a JSON-lines file, by which a run that was ended goes on; `-k` runs a part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SIDES = ("stock", "ours")
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
SNAPSHOT = "0" * 40
"""What the hub would have a commit's digits for."""

TINY = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 32768,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GLM = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
NEMOTRON = {"mamba_num_heads": 4, "mamba_head_dim": 4, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2Config", "AutoModelForCausalLM", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2Config", "AutoModelForSequenceClassification", {}),
    "tiny-Qwen3ForCausalLM": ("Qwen3Config", "AutoModelForCausalLM", {}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3Config", "AutoModelForSequenceClassification", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaConfig", "AutoModelForSequenceClassification", {}),
    "tiny-Cohere2ForCausalLM": ("Cohere2Config", "AutoModelForCausalLM", {}),
    "tiny-Gemma2ForCausalLM": ("Gemma2Config", "AutoModelForCausalLM", {}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeConfig", "AutoModelForCausalLM", EXPERTS),
    "tiny-GptOssForCausalLM": (
        "GptOssConfig",
        "AutoModelForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "tiny-Glm4MoeForCausalLM": ("Glm4MoeConfig", "AutoModelForCausalLM", GLM),
    "tiny-NemotronHForCausalLM-nano": ("NemotronHConfig", "AutoModelForCausalLM", NEMOTRON),
}
"""What the hub's tiny models are here: configuration, class, and what is particular."""


QWENS = 151_665
"""Tokens of Qwen's vocabulary, by which tests of tools write down what is sampled."""
SPECIAL = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|finetune_right_pad_id|>": 151646}
CALLS = {"<tool_call>": 151657, "</tool_call>": 151658}
SAID = """0 !|11 ,|16 1|17 2|18 3|19 4|25 :|27 <|29 >|40 I|64 a|65 b|66 c|198 Ċ|220 Ġ|293 Ġb|314 Ġ{|330 Ġ"|397 >Ċ|411 out|
450 de|497 ",|522 </|606 name|788 ":|894 Ġany|927 sh|944 't|1318 text|1414 Ġknow|1513 Ġdon|2765 Ġwon|4913 {"|5212 Ġ{"|
5392 Ġtool|6023 hi|6659 call|7692 async|9520 step|11248 }}Ċ|13477 crement|14172 tool|16252 Ġincrement|16370 arguments|
17453 Done|22785 _tool|35744 increment|64648 multiply|93054 _multiply|95642 "}}Ċ"""
"""What those tests have Qwen's tokens say, as far as they sample them."""
WORDS = ["error", "response", "user", "assistant", "increment", "decrement", "async"]
WORDS += ["Ġgot", "Ġan", "Ġunexpected", "Ġkeyword", "Ġargument", "Ġnot", "Ġfound", "Ġtool"]
"""Of tools' answers: letter by letter, these would not fit into the tests' completions."""


def _vocabulary(size: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return tokens and special ones; with as many as Qwen's those that tests write down stand where they stand there."""
    from tokenizers import pre_tokenizers

    special, said = {token: size - 4 + i for i, token in enumerate(SPECIAL)}, {}
    if size >= QWENS:
        special = SPECIAL | CALLS
        said = {
            token: int(i) for i, token in (part.strip().split(" ", 1) for part in SAID.replace("\n", "").split("|"))
        }
    taken = {*special.values(), *said.values()}
    free = (i for i in range(size) if i not in taken)
    letters = [letter for letter in sorted(pre_tokenizers.ByteLevel.alphabet()) if letter not in said]
    words = [word for word in WORDS if word not in said and size >= QWENS]
    known = said | dict(zip([*letters, *words], free, strict=False))
    return known | {f"{'w' * (i % 9)}{i}": i for i in free}, special


def tokenizer(vocabulary: int) -> Any:
    """Return a byte-level tokenizer of so many tokens, most of them words that no text is split into."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known, special = _vocabulary(vocabulary)
    made = Tokenizer(models.BPE(vocab=known | special, merges=[], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=[t for t in special if t not in CALLS], **named
    )
    fast.add_tokens([t for t in special if t in CALLS])
    fast.chat_template = CHATML
    return fast


def make_models(hub: Path, vocabulary: int) -> None:
    """Write the models into a folder that is laid out as the hub's cache, those that are not there yet."""
    import torch
    import transformers
    from trl.chat_template_utils import qwen3_chat_template

    read = tokenizer(vocabulary)
    for name, (config, kind, own) in MODELS.items():
        folder = hub / f"models--trl-internal-testing--{name}" / "snapshots" / SNAPSHOT
        if (folder / "tokenizer.json").exists():
            continue
        torch.manual_seed(0)
        ends = {"eos_token_id": read.eos_token_id, "pad_token_id": read.pad_token_id, "bos_token_id": None}
        made = getattr(transformers, config)(vocab_size=vocabulary, **TINY, **own, **ends)
        if "Sequence" in kind:
            made.num_labels = 1
        getattr(transformers, kind).from_config(made).save_pretrained(folder)
        read.chat_template = qwen3_chat_template if "Qwen3" in name and vocabulary >= QWENS else CHATML
        read.save_pretrained(folder)
        _name_it(folder)
    remote = hub / "models--trl-internal-testing--tiny-RemoteForCausalLM" / "snapshots" / SNAPSHOT
    if not (remote / "tokenizer.json").exists():
        _make_remote(remote, hub / "models--trl-internal-testing--tiny-Qwen2ForCausalLM-2.5" / "snapshots" / SNAPSHOT)
        _name_it(remote)


def _make_remote(folder: Path, like: Path) -> None:
    """Write a model whose class is in a file of its own."""
    folder.mkdir(parents=True)
    for file in like.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    config |= {"architectures": ["RemoteForCausalLM"], "auto_map": names, "model_type": "remote"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "remote.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n\n\n"
        'class RemoteConfig(Qwen2Config):\n    model_type = "remote"\n\n\n'
        "class RemoteForCausalLM(Qwen2ForCausalLM):\n    config_class = RemoteConfig\n"
    )


def _name_it(folder: Path) -> None:
    refs = folder.parent.parent / "refs"
    refs.mkdir(parents=True, exist_ok=True)
    (refs / "main").write_text(SNAPSHOT)


def run(checkout: Path, side: str, *, out: Path, part: str, steps: int = 0) -> None:
    """Run the tests that have no result yet, in a process of its own."""
    environment = os.environ | {
        "HF_HUB_CACHE": str(out / "hub"),
        "HF_MODULES_CACHE": str(out / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_SUITE_RESULTS": str(out / "results.jsonl"),
        "TRL_SUITE_SIDE": side,
        "TRL_SUITE_STEPS": str(steps),
    }
    words = ["-p", "trl_plugin", "-p", "no:cacheprovider", "-q", "-W", "ignore", "--tb=line", "--import-mode=append"]
    words += ["-k", part] if part else []
    command = [sys.executable, "-m", "pytest", *words, str(checkout / "tests" / "test_grpo_trainer.py")]
    subprocess.run(command, env=environment, cwd=out, stdin=subprocess.DEVNULL, check=False)


def told(results: Path) -> str:
    """Return the table: every test that ran on both sides, the totals, and what stock passes and ours does not."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    by_side = {side: {row["test"]: row for row in rows if row["side"] == side} for side in SIDES}
    stock, ours = by_side["stock"], by_side["ours"]
    both = [name for name in stock if name in ours and stock[name]["outcome"] != "apart"]
    lines = ["| test | stock | ours |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {stock[name]['outcome']} | {ours[name]['outcome']} |" for name in both]
    passed = [name for name in both if stock[name]["outcome"] == "passed"]
    fails = [name for name in passed if ours[name]["outcome"] != "passed"]
    apart = sum(row["outcome"] == "apart" for row in stock.values())
    counted = {side: dict(Counter(by_side[side][name]["outcome"] for name in both)) for side in SIDES}
    seconds = {side: round(sum(row["seconds"] for row in by_side[side].values())) for side in SIDES}
    lines += [
        "",
        f"Of {len(both)} tests ({apart} are apart): stock {counted['stock']}, ours {counted['ours']}; {seconds} s.",
    ]
    lines += [f"Of the {len(passed)} that stock passes, ours passes {len(passed) - len(fails)}. The others:", ""]
    return "\n".join([*lines, *(f"- `{name}`: {ours[name]['words']}" for name in fails)])


def main() -> None:
    """Make the models, run both sides, print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("checkout", type=Path, help="of TRL, at any version near the installed one")
    arguments.add_argument("--out", type=Path, default=Path("runs/trl-suite"), help="models and results")
    arguments.add_argument("-k", dest="part", default="", help="as pytest's")
    arguments.add_argument("--side", choices=SIDES, help="one side alone")
    arguments.add_argument("--steps", type=int, default=0, help="of a test, at most; 0: as they are")
    arguments.add_argument(
        "--vocabulary", type=int, default=20_000, help="tokens of the models; Qwen's own are 151,665"
    )
    given = arguments.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    make_models(out / "hub", given.vocabulary)
    for side in [given.side] if given.side else SIDES:
        run(given.checkout.resolve(), side, out=out, part=given.part, steps=given.steps)
    print(told(out / "results.jsonl"))


if __name__ == "__main__":
    main()
