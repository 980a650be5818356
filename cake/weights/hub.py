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
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(model_id, allow_patterns=list(patterns)))

    try:
        folder = download(*SMALL_FILES, INDEX)
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            shards = {file for name, file in weight_map.items() if wanted(name)}
        else:
            shards = {SINGLE}
        return download(*sorted(shards)) if shards else folder
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model_id!r} is no folder here, and the Hugging Face hub cannot be reached"
        ) from error
    except HfHubHTTPError as error:
        reason = "asks for a login (hf auth login)" if _is_refusal(error) else "has no such model"
        raise CheckpointError(f"{model_id!r} is no folder here, and the Hugging Face hub {reason}") from error
    except (OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{model_id!r} could not be downloaded: {error}") from error


def _is_refusal(error: Exception) -> bool:
    response = getattr(error, "response", None)
    return response is not None and response.status_code in (401, 403)
