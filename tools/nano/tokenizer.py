"""The tokenizer of phi4mm-nano: byte-level, each word of its world one token, with the real control tokens.

A byte-level BPE without merges: `ignore_merges` takes a whole word that is in the vocabulary as it is, any other word
falls apart into its bytes. So whatever UTF-8 text comes in goes through, and the closed vocabulary costs one token a
word, which makes speech and reading converge.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from phi4mm_jax.config import ModelConfig
from tools.nano.conversations import conversation_texts
from tools.nano.questions import READ, READ_ONE_OF_TWO
from tools.nano.vocabulary import WORDS

_FIRST_CONTROL = 199_999
"""Id of `<|endoftext|>` in the released tokenizer: the control tokens keep their distances from it."""
_CONTROLS = {
    199999: "<|endoftext|>",
    200010: "<|endoftext10|>",
    200011: "<|endoftext11|>",
    200018: "<|endofprompt|>",
    200019: "<|assistant|>",
    200020: "<|end|>",
    200021: "<|user|>",
    200022: "<|system|>",
    200023: "<|tool|>",
    200024: "<|/tool|>",
    200025: "<|tool_call|>",
    200026: "<|/tool_call|>",
    200027: "<|tool_response|>",
    200028: "<|tag|>",
}
_NOT_SPECIAL = range(200_023, 200_028)
_RSTRIP = range(200_019, 200_029)
_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def _words() -> list[str]:
    """All words, each as it stands at the beginning of a text and after a space."""
    questions = [text for texts in (*READ.values(), *READ_ONE_OF_TWO.values()) for text in texts]
    asked = sorted({word for text in (*conversation_texts(), *questions) for word in re.findall(r"[A-Za-z]+", text)})
    return [form for word in dict.fromkeys((*WORDS, *asked)) for form in (word, f" {word}")]


def tokenizer_files(config: ModelConfig) -> dict[str, Any]:
    """Returns file name to JSON value of the tokenizer's files.

    Raises:
      ValueError: the words do not fit below the control tokens.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = ["".join(piece for piece, _ in byte_level.pre_tokenize_str(word)) for word in _words()]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys((*letters, *spelled)))}
    first = config.tokens.pad
    if len(vocabulary) > first:
        raise ValueError(f"{len(vocabulary)} tokens do not fit below the first control token {first}")
    controls = [
        {
            "id": first + i - _FIRST_CONTROL,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": i in _RSTRIP,
            "normalized": False,
            "special": i not in _NOT_SPECIAL,
        }
        for i, content in _CONTROLS.items()
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": controls,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _PATTERN}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [],
        },
    }
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(t["id"]): {key: value for key, value in t.items() if key != "id"} for t in controls
        },
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _CONTROLS[_FIRST_CONTROL]),
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.text.max_position_embeddings,
        "tokenizer_class": "GPT2TokenizerFast",
    }
    return {"tokenizer.json": definition, "tokenizer_config.json": settings}


def write_tokenizer(directory: Path, config: ModelConfig) -> None:
    """Writes the tokenizer's files to an existing directory."""
    for name, value in tokenizer_files(config).items():
        (directory / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
