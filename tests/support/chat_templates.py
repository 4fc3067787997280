"""Chat templates in the shape of the families that people use, each with a tokenizer that knows its special tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.support.tiny_lm import byte_tokenizer


@dataclass(frozen=True)
class Family:
    """A chat template.

    Attributes:
        template: The template.
        special: Special tokens that it writes; the last ends a sequence.
        answers: What counts of `CHAT`, with `_` for what the template leaves out.
        calls: What counts of `TOOL_CHAT`; None if the template renders no tools.
        system: Whether it renders a system message.
    """

    template: str
    special: tuple[str, ...]
    answers: tuple[str, ...]
    calls: tuple[str, ...] | None = None
    system: bool = True

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer with one token for each byte and each special token."""
        tokenizer = byte_tokenizer(template=self.template)
        tokenizer.add_tokens(list(self.special), special_tokens=True)
        tokenizer.add_special_tokens({"eos_token": self.special[-1]})
        return tokenizer


CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
    {"role": "user", "content": "assistant 4"},
    {"role": "assistant", "content": "<think>\nyes\n</think>\n\n44"},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "look", "parameters": {"properties": {"city": {"type": "string"}}}}}
]
TOOL_CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "tool_calls": [
            {"type": "function", "id": "123456789", "function": {"name": "look", "arguments": {"city": "Rome"}}}
        ],
    },
    {"role": "tool", "name": "look", "tool_call_id": "123456789", "content": "sun"},
    {"role": "assistant", "content": "No."},
]

_CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_LLAMA3 = """{{- bos_token }}{%- set offset = 0 %}
{%- if messages[0].role == 'system' or tools %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{% for tool in tools %}{{- tool | tojson + '\n\n' }}{% endfor %}{% endif %}
{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- set offset = 1 %}{% endif %}
{{- '<|eot_id|>' }}{%- endif %}
{%- for m in messages[offset:] %}
{%- if m.tool_calls %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

_QWEN3 = """{%- if tools %}
{{- '<|im_start|>system\n<tools>' }}{%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
{{- '\n</tools><|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- if ns.last < 0 %}{{- raise_exception('No user query found in messages.') }}{%- endif %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

_GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""

_MISTRAL = """{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set loop_messages = messages[1:] if system else messages %}
{%- for m in loop_messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == 0 %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}
{{- '[INST] ' }}{%- if system and loop.last %}{{- system + '\n\n' }}{%- endif %}{{- m.content + '[/INST]' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls[0].id | length != 9 %}{{- raise_exception('Tool call IDs should have length 9') }}{%- endif %}
{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- ', "id": "' + call.id + '"}' }}{%- endfor %}{{- ']' + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""

_GPT_OSS = """{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- if tools %}{{- '<|start|>developer<|message|>' + tools | tojson + '<|end|>' }}{%- endif %}
{%- set ns = namespace(tool=none) %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if m.tool_calls %}
{%- set ns.tool = m.tool_calls[0].function.name %}
{{- '<|start|>assistant<|channel|>commentary to=functions.' + ns.tool + ' <|constrain|>json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- elif loop.last %}
{%- if m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- set ns.tool = none %}
{%- endif %}
{%- elif m.role == 'tool' %}
{%- if ns.tool is none %}{{- raise_exception('Tool message without a tool call') }}{%- endif %}
{{- '<|start|>functions.' + ns.tool + ' to=assistant<|channel|>commentary<|message|>' + m.content | tojson }}
{{- '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

_DEEPSEEK_R1 = """{{- bos_token }}{%- set ns = namespace(tool=false) %}
{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{%- set ns.tool = false %}{{- '<User>' + m.content }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{%- set ns.tool = false %}
{{- '<Assistant><calls>' }}{%- for call in m.tool_calls %}
{{- call.function.name + '\n```json\n' + call.function.arguments | tojson + '\n```' }}{%- endfor %}
{{- '</calls><end>' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1] %}
{{- (content if ns.tool else '<Assistant>' + content) + '<end>' }}{%- set ns.tool = false %}
{%- elif m.role == 'tool' %}{%- set ns.tool = true %}{{- '<output>' + m.content + '</output>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.tool %}{{- '<Assistant><think>\n' }}{%- endif %}"""

_PHI3 = """{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

_GRANITE = """{%- macro turn(role, content) %}{{- '<|start_of_role|>' + role + '<|end_of_role|>' + content }}
{{- '<|end_of_text|>\n' }}{%- endmacro %}
{%- if messages[0].role != 'system' %}{{- turn('system', 'You are an assistant.') }}{%- endif %}
{%- if tools %}{{- turn('tools', tools | tojson(indent=2)) }}{%- endif %}
{%- if documents %}{{- turn('documents', documents | map(attribute='text') | join('\n')) }}{%- endif %}
{%- for m in messages %}
{%- if m.tool_calls %}
{{- turn('assistant', '<|tool_call|>' + m.tool_calls | map(attribute='function') | list | tojson) }}
{%- elif m.role == 'tool' %}{{- turn('tool_response', m.content) }}
{%- else %}{{- turn(m.role, m.content) }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"""

_GLM = """[gMASK]<sop>{%- if tools %}{{- '<|system|>\n' + tools | tojson }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = (m.content or '').split('</think>')[-1].strip() %}
{{- '<|assistant|>\n<think></think>' }}{%- if content %}{{- '\n' + content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>' + call.function.name }}
{%- for key, value in call.function.arguments.items() %}
{{- '\n<arg_key>' + key + '</arg_key>\n<arg_value>' + value + '</arg_value>' }}{%- endfor %}
{{- '\n</tool_call>' }}{%- endfor %}
{%- elif m.role == 'tool' %}{{- '<|observation|>\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"""

_COMMAND = """{{- bos_token }}
{%- for m in messages %}
{{- '<|TURN|>' + {'user': '<|USER|>', 'assistant': '<|CHATBOT|>', 'system': '<|SYSTEM|>'}[m.role] }}
{{- m.content | trim + '<|END_OF_TURN|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|TURN|><|CHATBOT|>' }}{%- endif %}"""

_GEMMA4 = """{{- bos_token }}
{%- if tools %}{{- '<|turn>system\n<|tool>' + tools | tojson + '<tool|><turn|>\n' }}{%- endif %}
{%- set ns = namespace(open=false) %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- set call = messages[loop.index0 - 1].tool_calls[0].function.name %}
{{- '<|tool_response>response:' + call + '{value:<|"|>' + m.content + '<|"|>}<tool_response|>' }}
{%- elif m.role == 'assistant' %}
{%- if not ns.open %}{{- '<|turn>model\n' }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '<|tool_call>call:' + call.function.name + '{city:<|"|>' + call.function.arguments.city + '<|"|>}<tool_call|>' }}
{%- endfor %}{%- set ns.open = m.tool_calls is defined %}
{%- if not ns.open %}{{- m.content + '<turn|>\n' }}{%- endif %}
{%- else %}{{- '<|turn>' + m.role + '\n' + m.content + '<turn|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt and not ns.open %}{{- '<|turn>model\n' }}{%- endif %}"""

_LLAMA2 = """{%- for m in messages %}
{%- if m.role == 'system' %}{{- raise_exception('Only user and assistant roles are supported!') }}
{%- elif m.role == 'user' %}{{- bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{- ' ' + m.content | trim + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

_MARKED = """{{- bos_token }}{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|bot|>' }}{% generation %}{{- m.content + '<|stop|>' }}{% endgeneration %}
{%- else %}{{- '<|' + m.role + '|>' + m.content }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|bot|>' }}{%- endif %}"""

_THOUGHTS = ("<think>\nadd\n</think>\n\n4", "<think>\nyes\n</think>\n\n44")


def _ended(end: str, before: str = "") -> tuple[str, str]:
    """The two answers of `CHAT`, with their thoughts, between `before` and `end`."""
    first, second = (f"{before}{thought}{end}" for thought in _THOUGHTS)
    return first, second


FAMILIES = {
    "chatml": Family(_CHATML, ("<|im_start|>", "<|im_end|>"), _ended("<|im_end|>\n")),
    "llama3": Family(
        _LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        _ended("<|eot_id|>"),
        ('{"name": "look", "parameters": {"city": "Rome"}}<|eot_id|>', "No.<|eot_id|>"),
    ),
    "qwen3": Family(
        _QWEN3,
        ("<|im_start|>", "<|im_end|>"),
        ("4<|im_end|>\n", "<think>\nyes\n</think>\n\n44<|im_end|>\n"),
        (
            '<tool_call>\n{"name": "look", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n',
            "<think>\n\n</think>\n\nNo.<|im_end|>\n",
        ),
    ),
    "gemma": Family(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), _ended("<end_of_turn>\n"), system=False),
    "mistral": Family(
        _MISTRAL,
        ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "<end>"),
        _ended("<end>", " "),
        ('[TOOL_CALLS] [{"name": "look", "arguments": {"city": "Rome"}, "id": "123456789"}]<end>', " No.<end>"),
    ),
    "gpt-oss": Family(
        _GPT_OSS,
        ("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"),
        (
            "<|channel|>final<|message|><think>\nadd\n</think>\n\n4<|end|>",
            "<|channel|>final<|message|><think>\nyes\n</think>\n\n44<|return|>",
        ),
        (
            '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"city": "Rome"}<|call|>',
            "<|channel|>final<|message|>No.<|return|>",
        ),
    ),
    "deepseek-r1": Family(
        _DEEPSEEK_R1,
        ("<User>", "<Assistant>", "<calls>", "</calls>", "<output>", "</output>", "<end>"),
        ("\n\n4<end>", "\n\n44<end>"),
        ('<calls>look\n```json\n{"city": "Rome"}\n```</calls><end>', "No.<end>"),
    ),
    "phi3": Family(
        _PHI3,
        ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        ("<think>\nadd\n</think>\n\n4<|end|>\n", "<think>\nyes\n</think>\n\n44<|end|>\n<|endoftext|>"),
    ),
    "granite": Family(
        _GRANITE,
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<|end_of_text|>"),
        _ended("<|end_of_text|>\n"),
        (
            '<|tool_call|>[{"name": "look", "arguments": {"city": "Rome"}}]<|end_of_text|>\n',
            "No.<|end_of_text|>\n",
        ),
    ),
    # Its turns end with the token that starts the next one.
    "glm": Family(
        _GLM,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        ("\n<think></think>\n4<|user|>", "\n<think></think>\n44"),
        (
            "\n<think></think>\n<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
            "<|observation|>",
            "\n<think></think>\nNo.",
        ),
    ),
    "command": Family(
        _COMMAND,
        ("<|TURN|>", "<|USER|>", "<|CHATBOT|>", "<|SYSTEM|>", "<|END_OF_TURN|>"),
        _ended("<|END_OF_TURN|>"),
    ),
    # The answer of a tool is part of the turn that calls it.
    "gemma4": Family(
        _GEMMA4,
        (
            *("<|turn>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
            *('<|"|>', "<turn|>"),
        ),
        _ended("<turn|>\n"),
        ('<|tool_call>call:look{city:<|"|>Rome<|"|>}<tool_call|>', "No.<turn|>\n"),
    ),
    "llama2": Family(_LLAMA2, ("[INST]", "[/INST]", "<end>"), _ended(" <end>", " "), system=False),
    "marked": Family(_MARKED, ("<|user|>", "<|bot|>", "<|system|>", "<|stop|>"), _ended("<|stop|>")),
}
