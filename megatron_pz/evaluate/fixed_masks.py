"""Questions that never change: how learning is judged, since the generator chooses the training questions itself.

Random spans of given paragraphs, drawn once with a seed of their own; the same questions, sampled with the same seeds, at
every evaluation and in every run that is to be compared.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_pz.config.schema import EvaluateConfig, TaskConfig
from megatron_pz.errors import CorpusError
from megatron_pz.game.masking import shuffle_context
from megatron_pz.game.random_spans import fixed_masks
from megatron_pz.game.seeds import derive
from megatron_pz.tasks.ask import Asker
from megatron_pz.tasks.journal_rows import said
from megatron_pz.types import Generate, Mask, Paragraph


@dataclass(frozen=True)
class FixedMasks:
    """A named set of questions."""

    name: str  # metrics are `eval/<name>/...`
    masks: tuple[Mask, ...]


def fixed_set(
    name: str, paragraphs: Sequence[Paragraph], asker: Asker, config: EvaluateConfig, task: TaskConfig
) -> FixedMasks:
    """`num_fixed_masks` questions on `paragraphs`, chosen by `fixed_mask_seed`.

    Raises:
        CorpusError: not one question could be made.
    """
    masks = fixed_masks(
        paragraphs,
        config.num_fixed_masks,
        config.fixed_mask_seed,
        asker.rules,
        span_p=task.span_p,
        max_words=task.span_max_words,
        fits=asker.fits,
    )
    if not masks:
        raise CorpusError(
            f"No fixed mask could be made on the {len(paragraphs)} paragraphs of the set {name!r}; give it other text, "
            "or set --eval-interval 0."
        )
    return FixedMasks(name, tuple(masks))


def shuffled_set(questions: FixedMasks, asker: Asker, config: EvaluateConfig) -> FixedMasks:
    """The probe `shuffled`: `questions` with their words in an order of chance, the same at every evaluation.

    Whoever still answers them knows the text by heart, or guesses from the words alone: it does not read.
    """
    made = [
        shuffle_context(mask, random.Random(derive(config.fixed_mask_seed, "shuffled", index)))
        for index, mask in enumerate(questions.masks)
    ]
    return FixedMasks("shuffled", tuple(mask for mask in made if asker.fits(mask)))


async def score(
    questions: FixedMasks, asker: Asker, generate: Generate, config: EvaluateConfig
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics `eval/<set>/accuracy` and `eval/<set>/format_rate`, and one row an answer for `eval.jsonl`."""
    seeds = [
        (index, derive(config.fixed_mask_seed, questions.name, index, sample))
        for index in range(len(questions.masks))
        for sample in range(config.n_samples_per_fixed_mask)
    ]
    rollouts = await asyncio.gather(
        *(
            asker.predict(
                questions.masks[index],
                generate,
                seed,
                mask_id=f"{questions.name}.{index}",
                temperature=config.eval_temperature,
            )
            for index, seed in seeds
        )
    )
    rows = [
        {
            "set": questions.name,
            "paragraph_id": rollout.paragraph_id,
            "mask_id": rollout.mask_id,
            **said(rollout),
            "reward": rollout.reward,
        }
        for rollout in rollouts
    ]
    right = sum(rollout.reward for rollout in rollouts)
    metrics = {
        f"eval/{questions.name}/accuracy": right / len(rollouts),
        f"eval/{questions.name}/format_rate": sum(rollout.valid for rollout in rollouts) / len(rollouts),
    }
    return metrics, rows


def wilson_interval(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a share, by Wilson's score.

    >>> [round(bound, 3) for bound in wilson_interval(20, 100)]
    [0.133, 0.289]
    """
    share = right / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
