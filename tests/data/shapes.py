"""Tiny tokenizers with chat templates of many shapes; nothing here imports torch."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. user assistant system tool model",
    "Is the opinion in this sentence positive or negative? yes no one two three four five",
    "Paris is the capital of France, and 12 + 30 = 42.\n\nA list:\n- one\n- two\n",
    *["\n\n\n\nParagraphs and    spaces\n\n\n  follow\n\n\n  here"] * 3,
    'think reasoning name arguments {"name": "look_up", "arguments": {"city": "Paris"}}',
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}"
    "{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% elif m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n' }}"
    "{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'tool' %}"
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- elif m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- else %}"
    "{%- set content = m.content %}{%- set reasoning = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1]"
    ".lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}"
    "{{- content }}"
    "{%- for call in m.tool_calls or [] %}"
    "{{- '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ '<|observation|>\n' + m['content'] }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] | capitalize + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Strips an answer's spaces only once it is history.
STRIPPING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'] | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Turn tokens that are added to the vocabulary but not called special.
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'] + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# The next ones write before an answer what is not their generation prompt.
# A block of thinking is closed in the prompt and absent from history; a tool's answer belongs to
# the model's turn, and what follows it opens a turn that no prompt opens.
CLOSED_CHANNEL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ '<|tool_response>' + m['content'] + '<tool_response|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|turn>model\n' }}"
    "{% if m['reasoning_content'] %}"
    "{{ '<|channel>thought\n' + m['reasoning_content'] + '<channel|>' }}{% endif %}"
    "{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
    "{{ '<|tool_call>' + c['function']['name'] + c['function']['arguments'] | tojson }}"
    "{{ '<tool_call|>' }}{% endfor %}"
    "{% if not m['tool_calls'] %}{{ '<turn|>\n' }}{% endif %}"
    "{% else %}{{ '<|turn>' + m['role'] + '\n' + m['content'] + '<turn|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'tool' %}"
    "{{ '<|turn>model\n<|channel>thought\n<channel|>' }}{% endif %}"
    "{% if tools %}{{ tools[0]['function']['name'] }}{% endif %}"
)
OPEN_CHANNEL = CLOSED_CHANNEL.replace(
    "<|turn>model\n<|channel>thought\n<channel|>", "<|turn>model\n"
)
# Drops an answer's thinking, which the prompt opens.
DROPPED_THINK = DEEPSEEK.replace(
    "m['content'] + '<｜end▁of▁sentence｜>'",
    "m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>'",
).replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}")
CLOSED_THINK = DEEPSEEK.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜></think>' }}")
# Closes the block in history, and opens it in the prompt.
SHUT_THINK = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '<think>' + m['reasoning_content'] if m['reasoning_content'] else '' }}{{ '</think>' }}"
    "{% endif %}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
)
EMPTY_THINK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '<think>\n' + m['reasoning_content'] + '\n</think>\n' if m['reasoning_content'] "
    "else '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
# Announces a response in history, and skips the thinking in the prompt.
RESPONSE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + m['role'] + '|>' }}"
    "{{ '<|START_RESPONSE|>' if m['role'] == 'assistant' else '' }}"
    "{{ m['content'] + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|START_OF_TURN_TOKEN|><|assistant|><|START_THINKING|><|END_THINKING|>' }}{% endif %}"
)
# Puts the system message into the last user turn, if that is the last of all.
LATE_SYSTEM = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}"
    "{% if m['role'] == 'user' %}{{ '[INST]' }}"
    "{{ system + '\n\n' if loop.last and system else '' }}{{ m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Opens the thinking block in the prompt, as some reasoning models do.
OPENED_THINK = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"
)


@dataclass(frozen=True)
class Shape:
    """One template with the control tokens its tokenizer has."""

    template: str
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    terminator: str
    """What ends an answer."""
    has_post_processor: bool = False
    plain_tokens: tuple[str, ...] = ()
    """Tokens that are added without being called special."""
    split_pattern: str | None = None
    """How text is cut before merging; None: GPT-2's way, which keeps no line breaks together."""


SHAPES = {
    "chatml": Shape(CHATML, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"),
    "chatml-other-eos": Shape(
        CHATML, ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), None, "<|endoftext|>", "<|im_end|>"
    ),
    "llama3": Shape(
        LLAMA3,
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|eot_id|>",
        has_post_processor=True,
        split_pattern=r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "mistral": Shape(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>", True),
    "gemma": Shape(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<end_of_turn>",
        True,
    ),
    "phi": Shape(
        PHI,
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        None,
        "<|endoftext|>",
        "<|end|>",
    ),
    "qwen3": Shape(
        QWEN3,
        ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        None,
        "<|im_end|>",
        "<|im_end|>",
    ),
    "glm": Shape(
        GLM,
        (
            "[gMASK]",
            "<sop>",
            "<|user|>",
            "<|assistant|>",
            "<|system|>",
            "<|observation|>",
            "<|endoftext|>",
        ),
        None,
        "<|endoftext|>",
        "<|user|>",
    ),
    "plain": Shape(PLAIN, ("<|endoftext|>",), None, "<|endoftext|>", "<|endoftext|>"),
    "llama2": Shape(LLAMA2, ("<s>", "</s>"), "<s>", "</s>", "</s>", True),
    "deepseek": Shape(
        DEEPSEEK,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        plain_tokens=("<｜User｜>", "<｜Assistant｜>"),
    ),
    "stripping": Shape(STRIPPING, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>", "<|im_end|>"),
}

DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
CHANNEL_TOKENS = (
    "<bos>",
    "<eos>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
)


def _deepseek(template: str) -> Shape:
    bos, eos = DEEPSEEK_TOKENS
    added = ("<｜User｜>", "<｜Assistant｜>")
    return Shape(template, DEEPSEEK_TOKENS, bos, eos, eos, plain_tokens=added)


# Templates that take tools and calls in one form only.
ITEM_CALLS = (
    "[gMASK]<sop>{% if tools %}{{ '<|system|>' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ '<|observation|>' + m['content'] }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '\n<tool_call>' + c['function']['name'] }}"
    "{% for k, v in c['function']['arguments'].items() %}"
    "{{ '\n<arg_key>' + k + '</arg_key>\n<arg_value>' }}"
    "{{ v if v is string else v | tojson }}{{ '</arg_value>' }}{% endfor %}"
    "{{ '\n</tool_call>' }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEXT_CALLS = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t['function'] | tojson }}{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'tool' %}{{ '<tool>' + m['content'] + '</tool>' }}"
    "{% elif m['content'] is not defined %}{{ '<｜Assistant｜>' }}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] + '\n' + c['function']['arguments'] }}{% endfor %}"
    "{{ eos_token }}{% else %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
ID_CALLS = (
    "{{ bos_token }}{% for t in tools or [] %}{{ t['function'] | tojson }}{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}"
    "{% if m['tool_call_id'] | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    "{{ '[RESULT]' + m['tool_call_id'] + m['content'] + '[/RESULT]' }}"
    "{% elif m['tool_calls'] %}{{ '[CALLS]' }}{% for c in m['tool_calls'] %}"
    "{% if c['id'] | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
    "{{ c['function'] | tojson + c['id'] }}{% endfor %}{{ eos_token }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Writes what it is given with Python's own quotes.
BARE_CALLS = QWEN3.replace(
    "call.function | tojson", "(call.function.name ~ call.function.arguments)"
)
FLAT_TOOLS = QWEN3.replace("tool | tojson", "tool.name + tool.description")

IM_TOKENS = ("<|im_start|>", "<|im_end|>")
BEHIND_SHAPES = {
    "closed-channel": Shape(CLOSED_CHANNEL, CHANNEL_TOKENS, "<bos>", "<eos>", "<turn|>"),
    "open-channel": Shape(OPEN_CHANNEL, CHANNEL_TOKENS, "<bos>", "<eos>", "<turn|>"),
    "dropped-think": _deepseek(DROPPED_THINK),
    "closed-think": _deepseek(CLOSED_THINK),
    "opened-think": Shape(OPENED_THINK, IM_TOKENS, None, "<|im_end|>", "<|im_end|>"),
    "shut-think": Shape(
        SHUT_THINK,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"),
        None,
        "<|endoftext|>",
        "<|user|>",
    ),
    "empty-think": Shape(EMPTY_THINK, IM_TOKENS, None, "<|im_end|>", "<|im_end|>"),
    "response": Shape(
        RESPONSE,
        (
            "<BOS>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|user|>",
            "<|assistant|>",
            "<|START_RESPONSE|>",
            "<|START_THINKING|>",
            "<|END_THINKING|>",
        ),
        "<BOS>",
        "<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "late-system": Shape(LATE_SYSTEM, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>"),
}
"""Shapes whose generation prompt is not what they write before an answer."""

TOOL_SHAPES = {
    "item-calls": Shape(ITEM_CALLS, SHAPES["glm"].specials, None, "<|endoftext|>", "<|user|>"),
    "text-calls": _deepseek(TEXT_CALLS),
    "id-calls": Shape(ID_CALLS, ("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", "</s>"),
    "bare-calls": Shape(BARE_CALLS, IM_TOKENS, None, "<|im_end|>", "<|im_end|>"),
    "flat-tools": Shape(FLAT_TOOLS, IM_TOKENS, None, "<|im_end|>", "<|im_end|>"),
}
"""Shapes that take tools and calls in one form only."""

THINK_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@lru_cache
def make_shape(name: str) -> PreTrainedTokenizerFast:
    """Train a small byte-level tokenizer with the shape's control tokens and template."""
    return make_shape_tokenizer((SHAPES | BEHIND_SHAPES | TOOL_SHAPES)[name])


def make_shape_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    cut: Any = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=shape.split_pattern is None
    )
    if shape.split_pattern is not None:
        split = pre_tokenizers.Split(Regex(shape.split_pattern), behavior="isolated")
        cut = pre_tokenizers.Sequence([split, cut])
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["<|pad|>", *shape.specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [AddedToken(text, special=False) for text in (*THINK_TOKENS, *shape.plain_tokens)]
    )
    if shape.has_post_processor:
        bos = shape.bos or ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=shape.bos, eos_token=shape.eos, pad_token="<|pad|>"
    )
    fast.chat_template = shape.template
    return fast


@lru_cache
def make_spaced(way: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer that puts a space before text, in one of the ways that are in use."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if way == "normalizer":
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
        shown = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(shown)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=way)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=way)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(set("".join(CORPUS) + "▁\n[]/INST?<|>")),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_jsonl(path, rows) -> str:
    """Write rows as JSON lines; a str is written as it is (for malformed lines)."""
    import json

    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """Return alternating user/assistant messages."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for index, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return messages
