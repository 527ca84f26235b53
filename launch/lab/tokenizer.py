"""The policy's tokenizer: a word of the lexicon is one token with its leading space, all else is spelled by character.

Round trips are exact for printable ASCII and new lines; any other character is unknown to it.
"""

from __future__ import annotations

from typing import Any

from polyphony.launch.lab.lexicon import WORDS

PAD, BEGIN, END, UNKNOWN = "<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tokenizer() -> Any:
    """Return the tokenizer as transformers' fast one; `<|end|>` closes every message and is the end of generation."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *(chr(code) for code in range(32, 127))]
    words = [form for word in WORDS for form in (word, " " + word) if len(form) > 1]
    vocabulary = {token: i for i, token in enumerate((PAD, BEGIN, END, UNKNOWN, *ROLES, *characters, *words))}
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
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
