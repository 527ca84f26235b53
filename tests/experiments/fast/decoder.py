"""The lab's one architecture in plain torch: batched sampling with a cache, log-probabilities of answers.

A Qwen3 without grouped heads, whose head is tied to its embedding, on the CPU and in float32. Prompts are padded on the
right and read once however many completions they get; what attends to them is told where they end.

R rows, P prompt tokens, T completion tokens, H heads, D size of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Layer, queries, keys and values [R, H, n, D] of the tokens that are read; returns what they took in, of the same shape."""

BLOCKED = -1e30
WIDEST = 512
"""Rows that are sampled together: what the keys and values of more would push out of the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One completion with its end-of-sequence token if it has one.

    Example: `decoder.sample([[1, 5, 6]], seeds=[7], most=[8])[0].ids`
    """

    ids: list[int]
    logps: list[float]
    """Of each token."""
    entropy: float
    """Nats, summed over its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLayer:
    """The weights of one layer, those that read the same thing side by side."""

    before: Tensor
    after: Tensor
    query_norm: Tensor
    key_norm: Tensor
    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], number: int) -> DecoderLayer:
        """Take a layer out of a checkpoint's names."""
        w = {name: weights[f"model.layers.{number}.{name}.weight"] for name in LAYER_NAMES}
        return cls(
            before=w["input_layernorm"],
            after=w["post_attention_layernorm"],
            query_norm=w["self_attn.q_norm"],
            key_norm=w["self_attn.k_norm"],
            qkv=torch.cat([w[f"self_attn.{x}_proj"] for x in "qkv"]),
            out=w["self_attn.o_proj"],
            gate_up=torch.cat([w["mlp.gate_proj"], w["mlp.up_proj"]]),
            down=w["mlp.down_proj"],
        )


LAYER_NAMES = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}" for name in ("q_norm", "k_norm", "q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class Decoder:
    """A policy that can be sampled from and differentiated.

    Example: `Decoder(dict(model.named_parameters()), model.config)`
    """

    def __init__(self, weights: Mapping[str, Tensor], config: PretrainedConfig) -> None:
        """Take the weights as they are: what is computed with them has a gradient if they want one.

        Raises ValueError for another architecture.
        """
        check_architecture(config)
        self.heads, self.size, self.eps = config.num_attention_heads, config.head_dim, config.rms_norm_eps
        self.end = config.eos_token_id
        self.layers = [DecoderLayer.of(weights, number) for number in range(config.num_hidden_layers)]
        self.embedding, self.norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        steps = torch.arange(0, self.size, 2, dtype=torch.float32) / self.size
        theta = config.rope_parameters["rope_theta"] ** -steps
        angles = torch.arange(config.max_position_embeddings)[:, None] * torch.cat([theta, theta])
        self.cos, self.sin = angles.cos(), angles.sin()

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, ids: Tensor, positions: Tensor, attend: Attend, *, only: Tensor | None = None) -> Tensor:
        """Return the last layer's state of the tokens [R, n, width]; of one token a row, [R, 1, width], with `only` [R].

        The last layer then asks for those alone, whose place `attend` has to know.
        """
        rows, n = ids.shape
        x = self.embedding[ids]
        cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        for number, layer in enumerate(self.layers):
            mixed = functional.linear(self._normed(x, layer.before), layer.qkv)
            q, k, v = mixed.view(rows, n, 3, self.heads, -1).unbind(2)
            q, k = (_turned(self._normed(t, w), cos, sin) for t, w in ((q, layer.query_norm), (k, layer.key_norm)))
            if only is not None and layer is self.layers[-1]:
                x, q = x[torch.arange(rows), only][:, None], q[torch.arange(rows), only][:, None]
            taken = attend(number, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            x = x + functional.linear(taken.transpose(1, 2).reshape(rows, q.shape[1], -1), layer.out)
            gate, up = functional.linear(self._normed(x, layer.after), layer.gate_up).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, layer.down)
        return x

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [.., V] of states [.., width]."""
        return functional.linear(self._normed(states, self.norm), self.embedding)

    def read_prompts(self, ids: Tensor, lengths: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Return keys and values [R, H, P, D] of each layer, and the state after each prompt's last token [R, width]."""
        rows, width = ids.shape
        cache: list[tuple[Tensor, Tensor]] = []

        seen = torch.where(torch.arange(width) < lengths[:, None], 0.0, BLOCKED)[:, None, None]

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append((k, v))
            if number == len(self.layers) - 1:  # of each prompt's last token, that of a prompt of one token too
                return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            # padding is on the right, where the causal mask already keeps it from what counts
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        states = self.read(ids, torch.arange(width).expand(rows, -1), attend, only=lengths - 1)
        return cache, states[:, 0]

    def completion_logits(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]
    ) -> Tensor:
        """Return the logits [N, V] of the N tokens of all completions, in order; `completions` are G lists a prompt.

        A prompt is read once for all of its completions.
        """
        ids, lengths = padded(prompts)
        cache, last = self.read_prompts(ids, lengths)
        copies = len(completions[0])
        flat = [c for group in completions for c in group]
        given, counts = padded(flat)
        rows, n = given.shape
        states = last.repeat_interleave(copies, 0)[:, None]
        if n > 1:
            lengths = lengths.repeat_interleave(copies)
            past = torch.where(torch.arange(ids.shape[1]) < lengths[:, None], 0.0, BLOCKED)[:, None, None]
            own = torch.full((n - 1, n - 1), BLOCKED).triu(1)
            bias = torch.cat([past.expand(-1, 1, n - 1, -1), own.expand(rows, 1, -1, -1)], -1)

            def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                before = (t.repeat_interleave(copies, 0) for t in cache[number])
                k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
                return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

            read = self.read(given[:, :-1], lengths[:, None] + torch.arange(n - 1), attend)
            states = torch.cat([states, read], 1)
        return self.logits(states[torch.arange(n) < counts[:, None]])

    @torch.no_grad()
    def answer_logps(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """Return the log-probability of one answer a prompt, end-of-sequence token included if it is given."""
        found = [0.0] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), len(answers[i])))
        for start in range(0, len(prompts), WIDEST):
            places = by_length[start : start + WIDEST]
            tokens = torch.tensor([t for i in places for t in answers[i]])
            logps = self.completion_logits([prompts[i] for i in places], [[answers[i]] for i in places]).log_softmax(-1)
            each = logps.gather(1, tokens[:, None])[:, 0].split([len(answers[i]) for i in places])
            for i, of_tokens in zip(places, each, strict=True):
                found[i] = float(of_tokens.sum())
        return found

    # --- sampling -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        most: Sequence[int],
        temperature: float = 1.0,
    ) -> list[Sampled]:
        """Sample one completion a prompt, of at most so many tokens each; a completion depends on its own seed alone.

        At temperature 0 the likeliest token is taken each time.
        """
        found: dict[int, Sampled] = {}
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(prompts), WIDEST):
            places = by_length[start : start + WIDEST]
            asked, numbers, limits = ([of[i] for i in places] for of in (prompts, seeds, most))
            found |= zip(places, _Draw(self, asked, numbers, limits, temperature).all(), strict=True)  # type: ignore[arg-type]
        return [found[i] for i in range(len(prompts))]

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self.eps)


class _Draw:
    """One batch that is being sampled; rows that have ended are left out of what is still computed."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        most: Sequence[int],
        temperature: float,
    ) -> None:
        self.decoder, self.temperature, self.most = decoder, temperature, list(most)
        unique = list(dict.fromkeys(map(tuple, prompts)))
        place = {prompt: i for i, prompt in enumerate(unique)}
        of_row = torch.tensor([place[tuple(prompt)] for prompt in prompts])
        ids, lengths = padded(unique)
        cache, last = decoder.read_prompts(ids, lengths)
        self.width, longest = ids.shape[1], max(most)
        self.lengths, self.state = lengths[of_row], last[of_row]
        self.cache = [tuple(_with_room(t[of_row], longest) for t in pair) for pair in cache]
        past = torch.arange(self.width + longest)
        self.bias = torch.where((past < self.lengths[:, None]) | (past >= self.width), 0.0, BLOCKED)[:, None, None]
        self.chance = torch.from_numpy(np.stack([np.random.default_rng(seed).random(longest) for seed in seeds]))
        self.rows = torch.arange(len(prompts))  # what is still sampled
        self.tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
        self.logps = torch.zeros(len(prompts), longest)
        self.entropy = torch.zeros(len(prompts))
        self.counts = torch.tensor(self.most)

    def all(self) -> list[Sampled]:
        limit = self.counts.clone()
        for n in range(self.tokens.shape[1]):
            token = self._take(n)
            is_over = (token == self.decoder.end) | (limit[self.rows] == n + 1)
            self.counts[self.rows[is_over]] = n + 1
            if bool(is_over.all()):
                break
            if bool(is_over.any()):
                token = token[~is_over]
                self._keep(~is_over)
            self._read(token, n)
        return [
            Sampled(ids=self.tokens[i, :n].tolist(), logps=self.logps[i, :n].tolist(), entropy=float(self.entropy[i]))
            for i, n in enumerate(self.counts.tolist())
        ]

    def _take(self, n: int) -> Tensor:
        logits = self.decoder.logits(self.state)
        logps = (logits / (self.temperature or 1.0)).log_softmax(-1)
        chances = logps.exp()
        if self.temperature:
            reached = chances.cumsum(-1, dtype=torch.float64)
            wanted = self.chance[self.rows, n] * reached[:, -1]  # the sum is 1 but for rounding
            token = torch.searchsorted(reached, wanted[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
        else:
            token = logits.argmax(-1)
        self.tokens[self.rows, n] = token
        self.logps[self.rows, n] = logps.gather(1, token[:, None])[:, 0]
        self.entropy[self.rows] -= (chances * logps).sum(-1)
        return token

    def _keep(self, still: Tensor) -> None:
        self.rows, self.lengths, self.bias = self.rows[still], self.lengths[still], self.bias[still]
        self.cache = [tuple(t[still] for t in pair) for pair in self.cache]

    def _read(self, token: Tensor, n: int) -> None:
        here = self.width + n
        bias = self.bias[..., : here + 1]

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = self.cache[number]
            keys[:, :, here], values[:, :, here] = k[:, :, 0], v[:, :, 0]
            k, v = keys[:, :, : here + 1], values[:, :, : here + 1]
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

        self.state = self.decoder.read(token[:, None], (self.lengths + n)[:, None], attend)[:, 0]


def check_architecture(config: PretrainedConfig) -> None:
    """Raise ValueError for a model that this module would compute wrongly."""
    wanted = {"model_type": "qwen3", "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False}
    wanted |= {"use_sliding_window": False, "num_key_value_heads": config.num_attention_heads}
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise ValueError(f"the fast lab's decoder needs {name}={value!r}, the model has {getattr(config, name)!r}")


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids padded on the right, [R, longest], and the lengths [R]."""
    lengths = [len(row) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = torch.tensor(row)
    return ids, torch.tensor(lengths)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def _with_room(past: Tensor, n: int) -> Tensor:
    rows, heads, _, size = past.shape
    return torch.cat([past, past.new_zeros(rows, heads, n, size)], 2)
