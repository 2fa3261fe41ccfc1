"""A run that has not begun: its settings, and what they name, read when a check asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_pz.config.schema import Config
from megatron_pz.corpus.playable import read_playable
from megatron_pz.corpus.tokenizer import load_tokenizer
from megatron_pz.game.prompts import Templates
from megatron_pz.models.folder import read_hf_config, resolve_folder
from megatron_pz.types import Paragraph, Tokenizer


@dataclass
class Patient:
    """Properties raise what the launch would raise; none is read twice once it could be read."""

    config: Config
    world_size: int  # ranks that train
    platform: str = "cpu"  # "cuda": memory is that of GPUs
    gpu_memory_gib: float = 0.0  # 0: as the planner takes for granted

    @cached_property
    def folder(self) -> Path:
        return resolve_folder(self.config.model.hf_model)

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        return read_hf_config(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.model.tokenizer or self.folder)

    @cached_property
    def templates(self) -> Templates:
        return Templates.load(self.config.task.template_dir, self.config.task.prompt_style)

    @cached_property
    def task(self) -> Any:
        from megatron_pz.tasks.registry import make_task

        config = self.config
        return make_task(config.task, config.engine, self.tokenizer, self.templates, config.verifier)

    @cached_property
    def paragraphs(self) -> Sequence[Paragraph]:
        """That can be played."""
        return read_playable(self.config.corpus.data_path, self.config, self.tokenizer, self.task.prompt_ids)[0]

    @cached_property
    def plan(self) -> Any:
        """The planner's `Plan` of this layout."""
        from megatron_pz.doctor.planned import planned

        return planned(self.config, self.hf_config, self.world_size, self.platform, self.gpu_memory_gib)

    @cached_property
    def saved_steps(self) -> list[Path]:
        """Checkpoints that the run directory has already."""
        return sorted((Path(self.config.checkpoint.run_dir) / "checkpoints").glob("step_[0-9]*"))
