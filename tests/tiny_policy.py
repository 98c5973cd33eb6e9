"""A policy that has what the protocols ask for, and nothing more: a bigram table over a few letters."""

from __future__ import annotations

import torch
from torch import nn

from segrl.types import Frame, Prefix, PrefixState

LETTERS = "ab."  # the last one ends a completion


class TinyEncoder:
    """Letters are tokens."""

    def encode(self, messages, image):
        ids = torch.zeros(2, dtype=torch.long)
        height, width = image.shape[:2]
        return Prefix(
            token_ids=ids, token_types=ids, pixels=torch.zeros(1, 1), positions=ids.expand(3, 2),
            grid=torch.ones(1, 3, dtype=torch.long), frame=Frame(width, height),
        )  # fmt: skip

    def answer(self, text):
        return torch.tensor([LETTERS.index(c) for c in f"{text}."])

    def decode(self, tokens, mask):
        rows = zip(tokens.tolist(), mask.tolist(), strict=True)
        return ["".join(LETTERS[t] for t, m in zip(*row, strict=True) if m).rstrip(".") for row in rows]

    def token_at(self, tokens, end):
        return end - 1


class TinyDecoder:
    """Remembers nothing but the last token."""

    def __init__(self, groups, group):
        self.groups, self.group = groups, group

    def step(self, tokens):
        return one_hot(tokens)

    def keep(self, groups, rows):
        self.groups, self.group = rows.shape


class TinyPolicy(nn.Module):
    """Logits of the next letter given the last one; a prefix is a letter `a`."""

    pad_id, lora, gradient_checkpointing = 0, None, False

    def __init__(self):
        super().__init__()
        self.encoder = TinyEncoder()
        self.table = nn.Parameter(torch.zeros(len(LETTERS), len(LETTERS)))
        self.weights_version = 0

    device = property(lambda self: self.table.device)
    hidden_size, output_layer = len(LETTERS), None
    stop_ids = property(lambda self: torch.tensor([len(LETTERS) - 1]))

    def prefill(self, prefixes):
        last = one_hot(torch.stack([p.token_ids[-1] for p in prefixes]))
        return PrefixState(
            keys=[], values=[], attention_mask=torch.ones(len(prefixes), 2, dtype=torch.bool),
            next_position=torch.full((len(prefixes),), 2), last_hidden=last,
        )  # fmt: skip

    def decoder(self, state, group_size, length, stride=None, recorder=None):
        return TinyDecoder(len(state.attention_mask), group_size)

    def head(self):
        return self.table.detach()

    def logits(self, hidden, head):
        return hidden @ head

    def read(self, prefixes, completions, state=None):
        first = (state or self.prefill(prefixes)).last_hidden
        first = first.repeat_interleave(len(completions.tokens) // len(prefixes), 0)[:, None]
        return torch.cat([first, one_hot(completions.tokens[:, :-1])], 1)

    def logprobs_of(self, hidden, completions):
        chosen = (hidden @ self.table).log_softmax(-1).gather(-1, completions.tokens[..., None])[..., 0]
        return chosen.masked_fill(~completions.mask, 0.0)

    def logprobs(self, prefixes, completions, state=None):
        return self.logprobs_of(self.read(prefixes, completions, state), completions)

    def load_policy(self, weights):
        self.load_state_dict(weights)

    def bump_version(self):
        self.weights_version += 1


class ServedTinyPolicy(TinyPolicy):
    """With what vLLM needs beside."""

    weights, temperature, pass_dtype, most_positions, image_token_id = "folder", 1.0, torch.float32, 8, 0
    never_sampled = property(lambda self: torch.tensor([], dtype=torch.long))

    def features(self, prefix):
        return prefix.pixels

    def merged(self):
        yield from self.state_dict().items()

    def fingerprint(self):
        return str(self.table.sum().item())


def one_hot(tokens):
    return torch.nn.functional.one_hot(tokens, len(LETTERS)).float()
