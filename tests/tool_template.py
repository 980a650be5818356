"""The demo model with a chat template that knows tools, which its own does not."""

import shutil
from pathlib import Path

# What Llama 3.1's template does with tools, in the demo model's marks and fewer words.
TEMPLATE = """
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- if tools is not none %}{{ '<|im_start|>system\nAnswer with {"name": ..., "parameters": ...}.\n' }}
{%- for t in tools %}{{ t | tojson }}\n{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|im_start|>assistant\n{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}
{{- '}<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>ipython\n' + message.content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def with_tools(model: Path, folder: Path) -> Path:
    """The model again, in this folder, with that template."""
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
