"""A tiny random Llama that can be talked to: its tokens are bytes, and its template knows tools."""

import json
from pathlib import Path

from conftest import make_tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cake.model.tokenizer import BYTE_OF

END = "<end>"
TEMPLATE = """
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}{{ message.role[0] }}:{{ message.content }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
{% endfor %}a:"""


def make_speaking_llama(folder: Path) -> Path:
    """Write it as its maker would."""
    folder.mkdir()
    backend = Tokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True)])
    backend.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return make_tiny_llama(folder, vocab_size=257, eos_token_id=256)
