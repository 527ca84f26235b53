"""Rebuild the lab's policy: `python -m polyphony.launch.lab.warm_start [--seed 0] [--world 0] [--out launch/lab/policy]`.

Supervised training of a small Qwen3 on the train splits with noisy targets (`targets.py`), to partial competence. On
one thread the same seed gives the same weights, bit for bit, with the same torch build on the same kind of processor.
Left out on purpose: evaluation during training, mixed precision, any schedule but linear warm-up and cosine decay.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polyphony.launch.lab.targets import known_target, warm_target
from polyphony.launch.lab.tokenizer import build_tokenizer
from polyphony.launch.lab.world import rows

STEPS, BATCH, LEARNING_RATE, WARM_UP = 1200, 64, 3e-3, 50
"""Enough for partial competence and no more; chosen by the base scores it gives."""

SKILLS_UNTIL = 0.7
"""Share of the steps that teach skills; the rest teaches flawed habits. Noise from the start would drown the skills."""

SHARES = {"arithmetic": 0.4, "strings": 0.25, "facts": 0.15, "stories": 0.15, "safety": 0.05}
"""Share of each domain in a batch: sums are the slowest to learn."""


def train_policy(*, seed: int, world: int, steps: int = STEPS) -> tuple[Any, Any]:
    """Return (model, tokenizer) after `steps` supervised steps."""
    import torch

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    generator = random.Random(f"warm start/{seed}")
    spaces = {domain: rows(domain=domain, split="train", seed=seed, world=world) for domain in SHARES}
    for step in range(steps):
        target = known_target if step < SKILLS_UNTIL * steps else warm_target
        examples = sorted(_examples(spaces, generator, target), key=lambda pair: len(pair[0]) + len(pair[1]))
        losses = []
        # short and long texts apart: half of the padding
        for part in (examples[: BATCH // 2], examples[BATCH // 2 :]):
            loss = model(**collate(part, tokenizer)).loss / 2
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {sum(losses):.3f}", flush=True)
    return model.eval(), tokenizer


def build_model(vocabulary: int, tokenizer: Any) -> Any:
    """Return an untrained policy: a Qwen3 that vLLM serves (head size 32), in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def collate(examples: list[tuple[str, str]], tokenizer: Any) -> dict[str, Any]:
    """Return input ids, mask and labels, right-padded; only the completion and its end are learned."""
    import torch

    sequences = []
    for prompt, completion in examples:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        head = tokenizer(chat, add_special_tokens=False)["input_ids"]
        tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        sequences.append((head, tail))
    width = max(len(head) + len(tail) for head, tail in sequences)
    ids = torch.full((len(sequences), width), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (head, tail) in enumerate(sequences):
        ids[i, : len(head) + len(tail)] = torch.tensor(head + tail)
        labels[i, len(head) : len(head) + len(tail)] = torch.tensor(tail)
    lengths = torch.tensor([len(head) + len(tail) for head, tail in sequences])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long(), "labels": labels}


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, with sampling at temperature 1 as its generation default."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _examples(
    spaces: dict[str, list[dict]], generator: random.Random, target: Callable[..., str]
) -> list[tuple[str, str]]:
    domains = generator.choices(list(SHARES), list(SHARES.values()), k=BATCH)
    chosen = [(domain, generator.choice(spaces[domain])) for domain in domains]
    return [(row["prompt"], target(domain, row, generator)) for domain, row in chosen]


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def main() -> None:
    """Rebuild the committed policy, or one of another seed or world."""
    parser = argparse.ArgumentParser(description="Rebuild the policy of the lab.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=int, default=0, help="which knowledge base the facts come from")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "policy")
    arguments = parser.parse_args()
    model, tokenizer = train_policy(seed=arguments.seed, world=arguments.world)
    save_policy(model, tokenizer, arguments.out)
    print(f"{model.num_parameters():,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
