"""The program with one sign wrong, to see that the learning test would notice.

python flipped_run.py advantage|loss CONFIG.toml [--field value ...]
"""

import sys

from megatron_pz.train import launch as program


def flip_advantage() -> None:
    from megatron_pz.tasks import grouping

    right = grouping.advantages
    grouping.advantages = lambda rewards, eps=1e-6: tuple(-advantage for advantage in right(rewards, eps))


def flip_loss() -> None:
    from megatron_pz.train import step

    right = step.policy_loss

    def wrong(*args: object, **kwargs: object) -> tuple[object, object]:
        loss, stats = right(*args, **kwargs)
        return -loss, stats

    step.policy_loss = wrong


if __name__ == "__main__":
    {"advantage": flip_advantage, "loss": flip_loss}[sys.argv.pop(1)]()
    sys.exit(program.main(sys.argv[1:]))
