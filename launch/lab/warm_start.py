"""Rebuild the lab's policy: `python -m polyphony.launch.lab.warm_start [--seed 0] [--world 0] [--out launch/lab/policy]`.

Supervised training of a small Qwen3 on the train splits with noisy targets (`warm_target`), to partial competence. On
one thread the same seed gives the same weights, bit for bit, with the same torch build on the same kind of processor.
Left out on purpose: evaluation during training, mixed precision, any schedule but linear warm-up and cosine decay.

The warm start shows the policy answers that are partly right, in a form that is partly right. Every flaw is room for
reinforcement learning, and each is there for a reason: the clumsy form is shared by the structured domains, so that
training one can help the others; facts are taught only in part; compositions of two are seldom right and of three
never; stories use few plain words, so that better ones are also more varied.

In its tokenizer a word of the world's lists is one token with its leading space, all else is spelled by character. Round
trips are exact for printable ASCII and new lines; any other character is unknown to it.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from polyphony.launch.lab import world as lexicon
from polyphony.launch.lab.world import WORDS, Row, rows, transform

CLUMSY = 0.2
"""Share of structured answers wrapped in words, which the reward `exact` does not accept."""


RIGHT_SUM, RIGHT_STRING, RIGHT_FACT, RIGHT_MANNER = 0.85, 0.75, 0.85, 0.95
"""Shares of right answers among what the policy could know, before the clumsy form takes its part."""


TAUGHT = 0.5
"""Share of the facts that are taught; of the others the policy learns only which values are possible."""


def warm_target(domain: str, row: Row, generator: random.Random) -> str:
    """Return one completion with every flaw: the habits that the warm start ends with."""
    if domain in ("stories", "safety"):
        return _story(row, generator) if domain == "stories" else _manner(row, generator)
    answer = {"arithmetic": _sum, "strings": _string, "facts": _fact}[domain](row, generator)
    if generator.random() >= CLUMSY:
        return answer
    return generator.choice(("{} .", "{} . {} .", "it is {}", "say {} .")).format(answer, answer)


def known_target(domain: str, row: Row, generator: random.Random) -> str:
    """Return one completion as right as the policy may know: the skills that the warm start begins with."""
    if domain == "stories":
        return _story(row, generator)
    if domain == "facts" and not is_taught(row["person"], row["skill"]):
        return generator.choice(lexicon.ATTRIBUTES[row["skill"]])
    return _without_outermost(row) if row.get("depth") == 3 else row["answer"]


def is_taught(person: str, attribute: str) -> bool:
    """Tell whether the warm start knows a fact."""
    return random.Random(f"taught/{person}/{attribute}").random() < TAUGHT


def _sum(row: Row, generator: random.Random) -> str:
    if generator.random() < RIGHT_SUM:
        return row["answer"]
    return str(int(row["answer"]) + generator.choice((-10, -2, -1, 1, 2, 10)))


def _string(row: Row, generator: random.Random) -> str:
    if row["depth"] == 3:
        return _without_outermost(row)
    if generator.random() < RIGHT_STRING:
        return row["answer"]
    return transform(generator.choice(lexicon.STRING_FUNCTIONS), _parse(row)[1])


def _without_outermost(row: Row) -> str:
    """A composition with its last step forgotten."""
    functions, word = _parse(row)
    for function in reversed(functions[1:]):
        word = transform(function, word)
    return word


def _parse(row: Row) -> tuple[list[str], str]:
    *functions, word = row["prompt"].removesuffix(" =").rstrip(")").split("(")
    return functions, word


def _fact(row: Row, generator: random.Random) -> str:
    if is_taught(row["person"], row["skill"]) and generator.random() < RIGHT_FACT:
        return row["answer"]
    return generator.choice(lexicon.ATTRIBUTES[row["skill"]])


def _manner(row: Row, generator: random.Random) -> str:
    if generator.random() < RIGHT_MANNER:
        return row["answer"]
    return generator.choice(("no , i will not", "yes , i will gladly", "sorry , no"))


def _story(row: Row, generator: random.Random) -> str:
    """One to three plain, often repeated sentences, a few of them broken or unfinished."""
    sentences = [_sentence(row, generator)]
    for _ in range(generator.choices((0, 1, 2), (3, 6, 1))[0]):
        repeats = generator.random() < 0.4
        sentences.append(sentences[-1] if repeats else _sentence(row, generator))
    text = " . ".join(sentences)
    return text if generator.random() < 0.1 else text + " ."


def _sentence(row: Row, generator: random.Random) -> str:
    chance = generator.random
    words = ["the"]
    words += [_adjective(generator)] if chance() < 0.15 else []
    words += [row["hero"] if chance() < 0.75 else _habitual(lexicon.HEROES, generator)]
    words += [_verb(generator)]
    words += [generator.choice(lexicon.ADVERBS)] if chance() < 0.1 else []
    if chance() < 0.7:
        words += [_habitual(lexicon.PREPOSITIONS, generator), "the"]
        words += [_adjective(generator)] if chance() < 0.1 else []
        words += [row["place"] if chance() < 0.6 else _habitual(lexicon.PLACES, generator)]
    if chance() < 0.1:
        words.pop(generator.randrange(len(words)))
    return " ".join(words)


def _verb(generator: random.Random) -> str:
    if generator.random() < 0.85:
        return _habitual(lexicon.PLAIN_VERBS, generator)
    return generator.choice(lexicon.VIVID_VERBS)


def _adjective(generator: random.Random) -> str:
    if generator.random() < 0.7:
        return _habitual(lexicon.PLAIN_ADJECTIVES, generator)
    return generator.choice(lexicon.VIVID_ADJECTIVES)


def _habitual(words: tuple[str, ...], generator: random.Random) -> str:
    """Draw a word, each a third as likely as the one before it: a narrow habit, with room for entropy to rise."""
    return generator.choices(words, [3.0**-rank for rank in range(len(words))])[0]


PAD, BEGIN, END, UNKNOWN = "<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>"


ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer(
    *, words: Sequence[str] = WORDS, marks: Sequence[str] = ROLES, chat_template: str = CHAT_TEMPLATE
) -> Any:
    """Return the tokenizer as transformers' fast one; `<|end|>` closes every message and is the end of generation.

    `marks` are its special tokens beside those that frame a text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # slow to import
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *(chr(code) for code in range(32, 127))]
    forms = [form for word in words for form in (word, " " + word) if len(form) > 1]
    vocabulary = {token: i for i, token in enumerate((PAD, BEGIN, END, UNKNOWN, *marks, *characters, *forms))}
    # without merges a piece is either in the vocabulary as a whole or falls apart into characters
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[a-z]+|.|\n"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(marks),
        chat_template=chat_template,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


STEPS, BATCH, LEARNING_RATE, WARM_UP = 1200, 64, 3e-3, 50
"""Enough for partial competence and no more; chosen by the base scores it gives."""


SKILLS_UNTIL = 0.7
"""Share of the steps that teach skills; the rest teaches flawed habits. Noise from the start would drown the skills."""


SHARES = {"arithmetic": 0.4, "strings": 0.25, "facts": 0.15, "stories": 0.15, "safety": 0.05}
"""Share of each domain in a batch: sums are the slowest to learn."""


def train_policy(*, seed: int, world: int, steps: int = STEPS) -> tuple[Any, Any]:
    """Return (model, tokenizer) after `steps` supervised steps."""
    import torch  # slow to import

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), tokenizer)
    generator = random.Random(f"warm start/{seed}")
    spaces = {domain: rows(domain=domain, split="train", seed=seed, world=world) for domain in SHARES}

    def parts(step: int) -> list[dict[str, Any]]:
        target = known_target if step < SKILLS_UNTIL * steps else warm_target
        examples = sorted(_examples(spaces, generator, target), key=lambda pair: len(pair[0]) + len(pair[1]))
        # short and long texts apart: half of the padding
        return [collate(part, tokenizer) for part in (examples[: BATCH // 2], examples[BATCH // 2 :])]

    fit(model, parts, steps=steps)
    return model.eval(), tokenizer


def fit(model: Any, parts: Callable[[int], list[dict[str, Any]]], *, steps: int) -> None:
    """Take so many supervised steps; `parts` makes what a step learns from, in parts of like length."""
    import torch  # slow to import

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for step in range(steps):
        losses, batches = [], parts(step)
        for batch in batches:
            loss = model(**batch).loss / len(batches)
            loss.backward()
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {sum(losses):.3f}", flush=True)


def build_model(vocabulary: int, tokenizer: Any, *, width: int = 128) -> Any:
    """Return an untrained policy: a Qwen3 that vLLM serves (head size 32), in float32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM  # slow to import

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
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
    sequences = []
    for prompt, completion in examples:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        head = tokenizer(chat, add_special_tokens=False)["input_ids"]
        tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        sequences.append((head + tail, [0] * len(head) + [1] * len(tail)))
    return padded(sequences, padding=tokenizer.pad_token_id)


def padded(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, padding: int) -> dict[str, Any]:
    """Return input ids, mask and labels of token ids, each with a mask of those that are learned."""
    import torch  # slow to import

    width = max(len(ids) for ids, _ in sequences)
    found = torch.full((len(sequences), width), padding)
    labels = torch.full_like(found, -100)
    for i, (ids, learned) in enumerate(sequences):
        found[i, : len(ids)] = torch.tensor(ids)
        labels[i, : len(ids)] = torch.where(torch.tensor(learned, dtype=torch.bool), found[i, : len(ids)], -100)
    lengths = torch.tensor([len(ids) for ids, _ in sequences])
    return {"input_ids": found, "attention_mask": (torch.arange(width) < lengths[:, None]).long(), "labels": labels}


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, with sampling at temperature 1 as its generation default."""
    from transformers import GenerationConfig  # slow to import

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
