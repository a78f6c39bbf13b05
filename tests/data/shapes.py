"""Row shapes of public data sets, by the names of their columns, with words of our own.

Every text is different, so that a test can follow each to where it goes.
"""

from __future__ import annotations

from typing import Any


def turns(role: str, content: str, *names: str, **more: Any) -> list[dict[str, Any]]:
    """Return a turn for each name, each with a text of its own."""
    return [{role: name, content: f"{name} speaks {n}", **more} for n, name in enumerate(names, 1)]


TREE = {
    "message_tree_id": "tree-1", "tree_state": "ready",
    "prompt": {
        "message_id": "m1", "role": "prompter", "text": "how high is it", "lang": "en",
        "labels": {"spam": 0.1}, "replies": [
            {"role": "assistant", "text": "ten metres", "rank": 0, "replies": [
                {"role": "prompter", "text": "and how old", "replies": [
                    {"role": "assistant", "text": "a hundred years", "replies": []}]}]},
            {"role": "assistant", "text": "as high as a house", "rank": 1, "replies": []},
        ],
    },
}  # fmt: skip

# Those that are used as they are.
READ: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "i1", "input": "x1", "output": "o1", "text": "all of it"},
    "alpaca-cleaned": {"instruction": "i2", "input": "", "output": "o2"},
    "alpaca-gpt4-zh": {"instruction_zh": "zh", "instruction": "i3", "input": "x3", "output": "o3"},
    "dolly-15k": {"instruction": "i4", "context": "c4", "response": "r4", "category": "closed_qa"},
    "dolly, open question": {"instruction": "i5", "context": "", "response": "r5", "category": "k"},
    "belle": {"instruction": "i6", "input": "x6", "output": "o6"},
    "firefly": {"kind": "k7", "input": "x7", "target": "t7"},
    "gsm8k": {"question": "q8", "answer": "a8"},
    "metamath": {"query": "q9", "response": "r9", "type": "GSM", "original_question": "oq9"},
    "orca": {"id": "7", "system_prompt": "s10", "question": "q10", "response": "r10"},
    "orca-math": {"question": "q11", "answer": "a11"},
    "numina": {"source": "s", "problem": "p12", "solution": "s12",
               "messages": turns("role", "content", "user", "assistant")},
    "codealpaca": {"instruction": "i13", "input": "x13", "output": "o13"},
    "evol-instruct": {"instruction": "i14", "output": "o14"},
    "magicoder": {"lang": "python", "raw_index": 4, "index": 5, "seed": "s",
                  "openai_fingerprint": "f", "problem": "p15", "solution": "so15"},
    "code-feedback": {"id": 3, "messages": turns("role", "content", "user", "assistant")},
    "sharegpt": {"id": "a", "conversations": turns("from", "value", "human", "gpt")},
    "vicuna": {"conversations": turns("from", "value", "system", "human", "gpt", "human", "gpt")},
    "openhermes": {"conversations": turns("from", "value", "human", "gpt"), "source": "s",
                   "category": "c", "skip_prompt_formatting": False, "custom_instruction": None},
    "slimorca": {"conversations": turns("from", "value", "system", "human", "gpt", weight=None)},
    "ultrachat": {"prompt": "p20", "prompt_id": "h",
                  "messages": turns("role", "content", "user", "assistant")},
    "no-robots": {"prompt": "p21", "prompt_id": "h", "category": "c",
                  "messages": turns("role", "content", "system", "user", "assistant")},
    "smoltalk": {"messages": turns("role", "content", "user", "assistant"), "source": "s"},
    "tulu-3": {"id": "i", "source": "s", "messages": turns("role", "content", "user", "assistant")},
    "wildchat": {"conversation_hash": "h", "model": "m", "turn": 1, "language": "English",
                 "conversation": turns("role", "content", "user", "assistant", toxic=False),
                 "redacted": False},
    "lmsys-chat": {"conversation_id": "h", "model": "m",
                   "conversation": turns("role", "content", "user", "assistant")},
    "infinity-instruct": {"id": 1, "conversations": turns("from", "value", "human", "gpt"),
                          "label_count": 2, "langdetect": "en", "source": "s"},
    "magpie": {"uuid": "u", "instruction": "i28", "response": "r28", "model": "m",
               "conversations": turns("from", "value", "human", "gpt")},
    "moss": {"conversation": [{"human": "q29", "assistant": "a29"},
                              {"human": "q29b", "assistant": "a29b"}]},
    "openai": {"messages": turns("role", "content", "system", "user", "assistant")},
    "openai, weights": {"messages": [
        {"role": "user", "content": "q31"}, {"role": "assistant", "content": "a31", "weight": 0},
        {"role": "user", "content": "q31b"}, {"role": "assistant", "content": "a31b", "weight": 1},
    ]},
    "openai, parts": {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "q32"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a32"}]},
    ]},
    "gemini": {"systemInstruction": {"role": "system", "parts": [{"text": "s33"}]}, "contents": [
        {"role": "user", "parts": [{"text": "q33"}]},
        {"role": "model", "parts": [{"text": "a33"}]},
    ]},
    "bedrock": {"schemaVersion": "v", "system": [{"text": "s34"}], "messages": [
        {"role": "user", "content": [{"text": "q34"}]},
        {"role": "assistant", "content": [{"text": "a34"}]},
    ]},
    "cohere": {"messages": [{"role": "System", "content": "s35"},
                            {"role": "User", "content": "q35"},
                            {"role": "Chatbot", "content": "a35"}]},
    "trl, prompt and completion": {"prompt": "p36", "completion": "c36"},
    "trl, turns": {"prompt": turns("role", "content", "user"),
                   "completion": turns("role", "content", "assistant")},
    "llama-factory": {"instruction": "i38", "input": "x38", "output": "o38", "system": "s38",
                      "history": [["q38", "a38"]]},
    "ms-swift": {"system": "s39", "query": "q39", "response": "r39", "history": [["q39b", "a39b"]]},
    "ms-swift, loss": {"messages": [
        {"role": "user", "content": "q40"}, {"role": "assistant", "content": "a40", "loss": False},
        {"role": "user", "content": "q40b"}, {"role": "assistant", "content": "a40b", "loss": True},
    ]},
    "axolotl, train": {"messages": [
        {"role": "user", "content": "q41", "train": False},
        {"role": "assistant", "content": "a41", "train": True},
    ]},
    "rag, passages": {"question": "q42", "contexts": ["c42a", "c42b"], "answer": "a42",
                      "ground_truth": "g42"},
    "rag, titles": {"question": "q43", "ctxs": [{"id": "1", "title": "t43", "text": "c43"}],
                    "answer": "a43"},
    "text-to-sql": {"question": "q44", "context": "create table c44", "answer": "select a44"},
    "medical, zh": {"问题": "q45", "答案": "a45"},
    "instructions, zh": {"指令": "i46", "输入": "x46", "输出": "o46"},
    "spreadsheet": {"Question": "q47", "Answer": "a47", "Editor": "e47"},
    "wikipedia": {"id": "1", "url": "u", "title": "t48", "text": "body of t48"},
    "c4": {"text": "body 49", "timestamp": "2019", "url": "u"},
    "tinystories": {"text": "story 50"},
    "quotes": {"input": "x51", "output": "o51", "id": 3},
    "thoughts, a column": {"question": "q53", "reasoning": "r53", "answer": "a53"},
    "thoughts, medical": {"Question": "q54", "Complex_CoT": "r54", "Response": "a54"},
    "thoughts, a field": {"messages": [
        {"role": "user", "content": "q55"},
        {"role": "assistant", "reasoning_content": "r55", "content": "a55"},
    ]},
    "tools, openai": {"tools": [{"type": "function", "function": {"name": "look"}}], "messages": [
        {"role": "user", "content": "q56"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c56", "function": {"name": "look", "arguments": '{"where": "x56"}'}}]},
        {"role": "tool", "tool_call_id": "c56", "content": "t56"},
        {"role": "assistant", "content": "a56"},
    ], "parallel_tool_calls": False},
    "tools, sharegpt": {"tools": '[{"name": "find", "description": "d57"}]', "conversations": [
        {"from": "human", "value": "q57"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "w57"}}'},
        {"from": "observation", "value": "o57"}, {"from": "gpt", "value": "a57"},
    ]},
    "rag, documents": {"documents": [{"title": "t58", "text": "d58"}],
                       "messages": turns("role", "content", "user", "assistant")},
    "aya": {"inputs_language": "en", "instruction": "i52", "response": "r52", "user_id": "u"},
}  # fmt: skip

# Those that are refused, and the column that the message names.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "squad": ({"id": "1", "title": "t", "context": "c", "question": "q",
               "answers": {"text": ["a"], "answer_start": [0]}}, "question"),
    "sentiment": ({"text": "t", "label": 1}, "label"),
    "multiple choice": ({"question": "q", "choices": ["a", "b"], "answer": "a"}, "choices"),
    "vqa": ({"question": "q", "answer": "a", "image": {"bytes": "x", "path": "p"}}, "image"),
    "llava": ({"image": "p.jpg", "conversations": turns("from", "value", "human", "gpt")}, "image"),
    "kto": ({"prompt": "p", "completion": "c", "label": True}, "label"),
    "ultrafeedback": ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference"),
    "helpsteer, weights": ({"prompt": "p", "response": "r", "weight": 0.3}, "weight"),
    "two answers": ({"question": "q", "solution": "s", "answer": "a"}, "answer"),
    "vision parts": ({"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]},
        {"role": "assistant", "content": "a"}]}, "image_url"),
    "axolotl, spans": ({"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a",
         "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}]}, "train_detail"),
    "ms-swift, half a loss": ({"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "loss_scale": 0.5}]}, "loss_scale"),
    "a trained question": ({"messages": [
        {"role": "user", "content": "q", "train": True},
        {"role": "assistant", "content": "a"}]}, "--train-on-prompt"),
    "trl, template arguments": ({"messages": turns("role", "content", "user", "assistant"),
                                 "chat_template_kwargs": {"x": 1}}, "chat_template_kwargs"),
    "openai, a refusal": ({"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "refusal": "no"}]}, "refusal"),
    "mistral, prefix": ({"messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "prefix": True}]}, "prefix"),
}  # fmt: skip
