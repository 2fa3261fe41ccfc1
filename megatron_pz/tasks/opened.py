"""What the settings name, read and ready to play: the model's folder, its tokenizer, the templates, the task. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pz.config.schema import Config
from megatron_pz.corpus.tokenizer import check_vocab, load_tokenizer
from megatron_pz.game.prompts import Templates
from megatron_pz.models.folder import read_hf_config, resolve_folder
from megatron_pz.tasks.base import Task, TextTask
from megatron_pz.tasks.registry import make_task
from megatron_pz.types import Tokenizer


@dataclass(frozen=True)
class Opened:
    """Equal on all ranks, and with and without a trainer."""

    folder: Path  # of the model, here on a disk
    hf_config: Mapping[str, Any]  # its config.json
    tokenizer: Tokenizer
    templates: Templates
    task: Task | TextTask


def opened(config: Config) -> Opened:
    """What the sections model, task, engine and verifier of `config` name.

    Raises:
        ModelError, TokenizerError, TemplateError: it is not there, or the tokenizer has more ids than the model.
        ConfigError: a prompt leaves no room for text.
    """
    folder = resolve_folder(config.model.hf_model)
    hf_config = read_hf_config(folder)
    tokenizer = load_tokenizer(config.model.tokenizer or folder)
    check_vocab(tokenizer, int(hf_config["vocab_size"]))
    templates = Templates.load(config.task.template_dir, config.task.prompt_style)
    task = make_task(config.task, config.engine, tokenizer, templates, config.verifier)
    return Opened(folder, hf_config, tokenizer, templates, task)
