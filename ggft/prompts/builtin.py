"""The prompt templates that ggft brings, as Jinja sources.

They follow what the model families were trained on, with two extensions: a system message goes
where the family has no place for it in front of the next question, and a tool's result is given
like a question.
"""

from __future__ import annotations

# The tutorial's layout, for base models without a chat template.
INSTRUCTION = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'system' %}{{ m.content }}{{ '\\n\\n' }}"
    "{% else %}"
    "{% if (loop.previtem | default({})).role == 'assistant' %}{{ '\\n\\n' }}{% endif %}"
    "Instruction: {{ m.content }}\n{% if m.input %}Input: {{ m.input }}\n{% endif %}Output:"
    "{% endif %}{% endfor %}"
)

# Source: Stanford Alpaca, train.py.
ALPACA = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{{ '\\n\\n' }}"
    "{% elif m.role == 'system' %}{{ m.content }}{{ '\\n\\n' }}"
    "{% else %}{% if loop.first %}"
    "Below is an instruction that describes a task"
    "{% if m.input %}, paired with an input that provides further context{% endif %}"
    ". Write a response that appropriately completes the request.{{ '\\n\\n' }}{% endif %}"
    "### Instruction:\n{{ m.content }}\n\n"
    "{% if m.input %}### Input:\n{{ m.input }}\n\n{% endif %}### Response:\n"
    "{% endif %}{% endfor %}"
)

CHATML = (
    "{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Source: Llama 2's chat template on Hugging Face; every question begins with BOS.
LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\\n' ~ (m.content | trim) ~ '\\n<</SYS>>\\n\\n' %}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ ns.system }}{{ m.content | trim }} [/INST]"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
)

# Source: Llama 3's chat template on Hugging Face; results of tools have the role ipython.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)

# Source: Gemma's chat template on Hugging Face.
GEMMA = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = (m.content | trim) ~ '\\n\\n' %}"
    "{% elif m.role == 'assistant' %}"
    "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>\n"
    "{% else %}<start_of_turn>user\n{{ ns.system }}{{ m.content | trim }}<end_of_turn>\n"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Source: Mistral 7B Instruct's chat template on Hugging Face.
MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = (m.content | trim) ~ '\\n\\n' %}"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
    "{% else %}[INST] {{ ns.system }}{{ m.content | trim }} [/INST]"
    "{% set ns.system = '' %}{% endif %}{% endfor %}"
)

BUILTIN = {
    "instruction": INSTRUCTION,
    "alpaca": ALPACA,
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
}
KNOW_INPUT = frozenset({INSTRUCTION, ALPACA})  # these set `input` apart from the instruction
