"""Names that Megatron imports; its router is not fused here."""


def fused_topk_with_score_function(*args, **kwargs):
    raise NotImplementedError


fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function
