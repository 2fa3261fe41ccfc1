"""The 2 M-parameter Qwen3 folder that both sides of `grpo_vs_trl.py` learn on: random weights, a tokenizer of 1024 ids.

Usage: small_model.py OUT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NUM_WORDS = 700
FIRST_WORD = 2  # ids 0 and 1 are <pad> and <eos>


def make(folder: Path) -> int:
    """Write model and tokenizer to `folder`; the number of parameters. Same folder every time."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # Whole words, so that a prompt of n words has n tokens on both sides, however it is taken apart and put together.
    words = [f"w{number} " for number in range(NUM_WORDS)]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<eos>", *words],
        show_progress=False,
    )
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=1024,
            hidden_size=192,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=512,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def prompts(count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of `tokens` random words as ids, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_WORD, FIRST_WORD + NUM_WORDS, (count, tokens), generator=generator).tolist()


if __name__ == "__main__":
    print(f"{make(Path(sys.argv[1]))} parameters in {sys.argv[1]}")
