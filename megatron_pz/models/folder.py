"""A Hugging Face model folder on this machine, and its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_pz.errors import ModelError


def resolve_folder(name: str | Path) -> Path:
    """The folder of a path, or of a hub name after fetching it (config, tokenizer, safetensors).

    Raises:
        ModelError: there is no such folder, and nothing of that name can be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise ModelError(f"model folder {str(name)!r} does not exist; give a folder with config.json, or a hub name.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = " ".join(str(error).split("\n", 1)[0].split())  # the hub writes on; a fault is a line
        raise ModelError(
            f"model {str(name)!r} is no folder here and could not be fetched ({type(error).__name__}: {why}); "
            "give the path of a downloaded folder."
        ) from error


def read_hf_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder or hub name.

    Raises:
        ModelError: it is missing or not JSON.
    """
    path = resolve_folder(folder) / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; a model folder has a config.json.") from error
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is not JSON: {error}.") from error
