"""Which pieces of what has left the window queries ask for: representative keys, and scores over them."""

import torch


def representatives(keys: torch.Tensor, unit_tokens: int) -> torch.Tensor:
    """[layers, kv_heads, tokens, head_dim] to [layers, units, kv_heads, representatives, head_dim]."""
    layers, kv_heads, _, head_dim = keys.shape
    return keys.view(layers, kv_heads, -1, unit_tokens, head_dim).transpose(1, 2)


def choose(queries: torch.Tensor, representatives: torch.Tensor, num: int) -> torch.Tensor:
    """queries [rows, heads, head_dim], representatives [units, kv_heads, r, head_dim]; `num` units, oldest first."""
    rows, heads, head_dim = queries.shape
    units, kv_heads, r, _ = representatives.shape
    grouped = queries.float().view(rows, kv_heads, heads // kv_heads, head_dim).permute(1, 0, 2, 3).flatten(1, 2)
    keys = representatives.float().permute(1, 0, 2, 3).flatten(1, 2)
    scores = torch.matmul(grouped, keys.transpose(1, 2)) * head_dim**-0.5  # [kv_heads, rows * group, units * r]
    mass = torch.softmax(scores, -1).view(kv_heads, -1, units, r).sum(-1).amax((0, 1))
    return mass.topk(num).indices.sort().values
