"""Which pieces of what has left the window queries ask for: representatives, and shares of an attention over them.

Without training, after InfLLM (Xiao et al. 2024): a piece is known by a few representatives a layer and KV head, all
queries and keys as they are before their positions. Each KV head has a choice of its own: in a small model a single
head of a single layer may be the one that looks facts up.
"""

import torch
from torch.nn.functional import max_pool1d

REPRESENTED_TOKENS = 2
"""So many keys that follow each other are represented by their mean."""
NEIGHBOUR = 0.9
"""The share of a unit that its neighbours have, too: what is looked for may lie across an edge."""


def representatives(keys: torch.Tensor, unit_tokens: int) -> torch.Tensor:
    """[layers, kv_heads, tokens, head_dim] to [layers, kv_heads, units, representatives, head_dim], in float32."""
    layers, kv_heads, num_tokens, head_dim = keys.shape
    each = min(REPRESENTED_TOKENS, unit_tokens)
    means = keys.float().view(layers, kv_heads, num_tokens // each, each, head_dim).mean(3)
    return means.view(layers, kv_heads, num_tokens // unit_tokens, unit_tokens // each, head_dim)


def shares(queries: torch.Tensor, representatives: torch.Tensor) -> torch.Tensor:
    """How much each unit is asked for: queries [layers, rows, heads, head_dim] and representatives [layers, kv_heads,
    units, representatives, head_dim] to [layers, kv_heads, units], float32.

    A query's share for a unit is the unit's part in a softmax over all units, each as near as its nearest
    representative. Of a KV head's queries, and of all rows, the largest counts.
    """
    layers, rows, heads, head_dim = queries.shape
    _, kv_heads, units, each, _ = representatives.shape
    grouped = queries.view(layers, rows, kv_heads, heads // kv_heads, head_dim).transpose(1, 2).flatten(2, 3)
    keys = representatives.flatten(2, 3).transpose(2, 3)
    scores = torch.matmul(grouped.to(keys.dtype), keys).view(layers, kv_heads, -1, units, each)
    nearest = scores.amax(-1).float() * head_dim**-0.5
    return torch.softmax(nearest, -1).amax(2)


def spread(shares: torch.Tensor) -> torch.Tensor:
    """Units' shares [layers, kv_heads, units], each with a part of its neighbours'."""
    return torch.maximum(shares, NEIGHBOUR * max_pool1d(shares, 3, stride=1, padding=1))
