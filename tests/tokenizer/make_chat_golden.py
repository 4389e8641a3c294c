"""Writes chat_golden.json: conversations as transformers (5.23) renders them with the families' own templates (Jinja),
and their ids.

    make_chat_golden.py

The tokenizers are the small ones of this folder with each family's markers added. A context is cut off behind its text,
so that the ids are those of the rendered conversation up to there and, separately, from there on.
"""
import json
import pathlib

from transformers import PreTrainedTokenizerFast
from tokenizers import AddedToken, Tokenizer

HERE = pathlib.Path(__file__).parent

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")

QWEN25 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

QWEN3 = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""

# The later kind that always reasons.
QWEN3_THINKING = QWEN3[:QWEN3.rindex("{%- if add_generation_prompt %}")] + r"""{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

LLAMA31 = r"""{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- This block extracts the system message, so we can slot it into the right place. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}

{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

LLAMA32 = LLAMA31.replace("""    {%- set date_string = "26 Jul 2024" %}
""", """    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
""")

NEMO = r"""{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS][" }}
            {{- "]" + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST]" + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- message["content"] + eos_token}}
    {%- endif %}
{%- endfor %}
"""

MISTRAL_V3 = NEMO.replace('"[INST]"', '"[INST] "').replace('"[AVAILABLE_TOOLS]["', '"[AVAILABLE_TOOLS] ["').replace(
    '{{- message["content"] + eos_token}}', '{{- " " + message["content"]|trim + eos_token}}')

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}{% endfor %}")

IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ML = ["<s>", "</s>", "[INST]", "[/INST]"]
THINK = ["<think>", "</think>"]  # added, not special
# format: what Refocus calls it; template; small tokenizer; special and further tokens; begin and end
FAMILIES = {
    "smollm2": ("chatml", SMOLLM2, "smollm", IM, [], "<|im_start|>", "<|im_end|>"),
    "qwen2": ("chatml", QWEN2, "qwen2", IM, [], None, "<|im_end|>"),
    "qwen2.5": ("chatml", QWEN25, "qwen2", IM, [], None, "<|im_end|>"),
    "qwen3": ("qwen3", QWEN3, "qwen2", IM, THINK, None, "<|im_end|>"),
    "qwen3-thinking": ("qwen3", QWEN3_THINKING, "qwen2", IM, THINK, None, "<|im_end|>"),
    "llama3": ("llama3", LLAMA3, "llama-bpe", LL, [], "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.1": ("llama3.1", LLAMA31, "llama-bpe", LL, [], "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.2": ("llama3.2", LLAMA32, "llama-bpe", LL, [], "<|begin_of_text|>", "<|eot_id|>"),
    "nemo": ("mistral-tekken", NEMO, "gpt-2", ML, [], "<s>", "</s>"),
    "mistral-v3": ("mistral-v3", MISTRAL_V3, "gpt-2", ML, [], "<s>", "</s>"),
    "mistral-v1": ("mistral", MISTRAL, "gpt-2", ML[:2], [], "<s>", "</s>"),
}

DOCUMENT = "It is a truth universally acknowledged:\r\n\n  42 caf\u00e9s, na\u00efve 👩\u200d👩\u200d👧 and \u4e2d\u6587.\n"
CASES = [
    dict(question="\nWho?"),
    dict(system="Be brief.", question="\n\nWho says so, and why?  \n"),
    dict(system="", question=" x"),
    dict(system="  Two\nlines. \u3000\n", user="Read this:\n\n", question="Now: how many?"),
    dict(user=" \n\t", document="\n \u2003 A text with space around.", question=" \u00a0"),
    dict(document="", question="No document at all?"),
    dict(earlier=[["\nWho?", "A  truth. "]], question="And\twhy? "),
    dict(system="Be brief.", user="Text: ", earlier=[["Q1\n", "\n1\n"], ["  Q2", "two\n\n"]], question=" Q3 "),
    dict(earlier=[["\nQ", "<think>\nHm.\n\nYes.\n</think>\n\nSo it is."]], question="Go on."),
    dict(system="S", date="01 Feb 2026", question="\nWhen?"),
]


def tokenizer_of(kind, special, further):
    out = Tokenizer.from_file(str(HERE / kind / "tokenizer.json"))
    out.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    out.add_tokens([AddedToken(t, special=False, normalized=False) for t in further])
    return out


def render(reference, family, case, thinking):
    document = case.get("document", DOCUMENT)
    earlier = case.get("earlier", [])
    questions = [question for question, _ in earlier] + [case["question"]]
    first = case.get("user", "") + document + questions[0]
    messages = []
    if "system" in case:
        if family.startswith(("nemo", "mistral")):
            first = case["system"] + "\n\n" + first  # these templates move it to the last turn, behind the context
        else:
            messages.append({"role": "system", "content": case["system"]})
    messages.append({"role": "user", "content": first})
    for i, (_, answer) in enumerate(earlier):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": questions[i + 1]}]
    options = {} if thinking is None else {"enable_thinking": thinking}
    if family.startswith("llama3."):
        options["date_string"] = case.get("date", "26 Jul 2024")
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    # Where the context ends: behind its last text.
    body = (case.get("user", "") + document)
    body = body.lstrip() if family.startswith("llama") else body
    opened = text[:text.index(questions[0].strip() or "\u0000")] if not body else None
    cut = len(opened) if opened is not None else text.index(body) + len(body)
    return text, cut


def main():
    out = []
    for family, (name, template, kind, special, further, bos, eos) in FAMILIES.items():
        tokenizer = tokenizer_of(kind, special, further)
        reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos,
                                            chat_template=template)
        cases = []
        for case in CASES:
            if ("date" in case) != ("date" in case and family.startswith("llama3.")):
                continue
            for thinking in (None, True, False) if family == "qwen3" else (None,):
                text, cut = render(reference, family, case, thinking)
                ids = [i for part in (text[:cut], text[cut:])
                       for i in tokenizer.encode(part, add_special_tokens=False).ids]
                one = {"document": DOCUMENT, **case, "text": text, "ids": ids}
                if family == "llama3.2":
                    one.setdefault("date", "26 Jul 2024")
                if thinking is not None:
                    one["thinking"] = thinking
                cases.append(one)
        out.append({"family": family, "format": name, "template": template, "tokenizer": kind, "special": special,
                    "further": further, "bos": bos, "eos": eos, "cases": cases})
    (HERE / "chat_golden.json").write_text(json.dumps(out, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
