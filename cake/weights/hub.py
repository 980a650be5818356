"""Models from the Hugging Face hub: only the files that a node needs, kept in the hub's own cache."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from cake.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def is_hub_id(model: str) -> bool:
    """Whether `model` has the form `organisation/name`."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) is not None


def fetch_model(model_id: str, wanted: Callable[[str], bool]) -> Path:
    """Download a model's small files and the shards that hold a `wanted` tensor.

    Returns the folder of the snapshot. Raises `CheckpointError` when the hub is out of reach or has
    no such model; files that are in the hub's cache already are not downloaded again.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(model_id, allow_patterns=list(patterns)))

    try:
        folder = download(*SMALL_FILES, INDEX)
        shards = _shards(folder, wanted)
        return download(*shards) if shards else folder
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model_id!r} is no folder here, and the Hugging Face hub cannot be reached"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"the Hugging Face hub gives {model_id!r} only to those who were granted access: ask for it on "
            "the model's page, then 'hf auth login'"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{model_id!r} is no folder here, and the Hugging Face hub has no such model, or none that your "
            "login may see"
        ) from error
    except Exception as error:  # whatever the hub's transport and a malformed index raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{model_id!r} could not be downloaded: {reason}") from error


def _shards(folder: Path, wanted: Callable[[str], bool]) -> list[str]:
    """The weight files that hold a wanted tensor; the single file where there is no index."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return sorted({file for name, file in weight_map.items() if wanted(name)})
