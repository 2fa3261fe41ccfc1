"""Tokens put in order of their experts, and back. What a kernel need not read is read here (`masked_select`, `tolist`)."""

import torch

from transformer_engine.common import CALLED


def _places(routing_map):
    """Token of each row of the output, expert by expert."""
    tokens = torch.arange(routing_map.shape[0]).expand(routing_map.shape[1], -1)
    return tokens.masked_select(routing_map.bool().T)


def moe_permute(inp, routing_map, num_out_tokens=-1, max_token_num=-1, map_type="mask"):
    CALLED.add("moe_permute")
    assert map_type == "mask" and inp.shape[0] == routing_map.shape[0]
    places = _places(routing_map)
    assert num_out_tokens in (-1, len(places)), "no token is dropped"
    return inp.index_select(0, places), places


def moe_permute_with_probs(inp, probs, routing_map, num_out_tokens=-1):
    CALLED.add("moe_permute_with_probs")
    output, places = moe_permute(inp, routing_map, num_out_tokens)
    return output, probs.T.masked_select(routing_map.bool().T), places


def moe_unpermute(inp, row_id_map, merging_probs=None, restore_shape=None):
    CALLED.add("moe_unpermute")
    assert merging_probs is None, "the experts have multiplied by them"
    return inp.new_zeros(restore_shape).index_add(0, row_id_map, inp)


def moe_sort_chunks_by_index(inp, split_sizes, sorted_index):
    CALLED.add("moe_sort_chunks_by_index")
    chunks = inp.split(split_sizes.tolist())
    return torch.cat([chunks[index] for index in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(inp, probs, split_sizes, sorted_index):
    return tuple(moe_sort_chunks_by_index(x, split_sizes, sorted_index) for x in (inp, probs))
