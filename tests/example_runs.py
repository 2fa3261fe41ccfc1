"""How many ranks train in each example of examples/*.toml; what is not named here runs on one."""

RANKS = {
    "pretrain_zero_smollm3_3b": 8,
    "pretrain_zero_qwen3_4b": 8,
    "pretrain_zero_qwen3_8b": 8,
    "pretrain_zero_30b_1node": 8,
    "pretrain_zero_30b_2node": 16,
    "pretrain_zero_30b_4node": 32,
    "pretrain_zero_30b_8node": 64,
    "pretrain_zero_30b_1node_disaggregated": 4,
    "pretrain_zero_30b_2node_disaggregated": 8,
    "pretrain_zero_30b_4node_disaggregated": 8,
    "pretrain_zero_30b_8node_disaggregated": 16,
}
