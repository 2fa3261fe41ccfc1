"""Next-token reasoning, the paper's other baselines (docs/paper.md 5): the text is cut behind a token, and the policy, after
thinking, predicts that token.

`random_ntp`   the token is any of the paragraph's.
`entropy_ntp`  it is one of the `entropy_share` of tokens that the policy itself is least sure of.

A paragraph without a token that can be asked for is passed over.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from megatron_pz.errors import ConfigError
from megatron_pz.game.next_tokens import hardest, next_token_mask
from megatron_pz.game.seeds import derive
from megatron_pz.tasks.base import Seed
from megatron_pz.tasks.predicting import Predicting
from megatron_pz.types import Mask, Paragraph


class NextToken(Predicting):
    """Single tokens, each with what follows it."""

    def masks(self, paragraph: Paragraph, seed: Seed, place: int) -> list[Mask | None]:
        """As everywhere.

        Raises:
            ConfigError: `entropy_ntp` is played where nobody measures the policy's entropies.
        """
        tokenizer = self.asker.tokenizer
        token_ids = tokenizer.encode(paragraph.text)
        places = self._places(paragraph, len(token_ids))
        return [
            next_token_mask(
                paragraph,
                token_ids,
                places,
                tokenizer.decode,
                random.Random(derive(*seed, place, paragraph.id, "token", index)),
                fits=self.asker.fits,
            )
            for index in range(self.config.n_masks_per_paragraph)
        ]

    def _places(self, paragraph: Paragraph, num_tokens: int) -> Sequence[int]:
        if self.config.task != "entropy_ntp":
            return range(1, num_tokens)
        if paragraph.token_entropies is None:
            raise ConfigError(
                "task.task is 'entropy_ntp', which asks for the tokens that the policy is least sure of; only a trainer can "
                "measure that, and there is none here. Play it in a training run, or use --task random_ntp."
            )
        assert len(paragraph.token_entropies) == num_tokens, (len(paragraph.token_entropies), num_tokens)
        return hardest(paragraph.token_entropies, self.config.entropy_share)
