"""Error messages in the words of the command line: options instead of Python arguments.

Errors are raised by the library, whose messages name arguments of its functions. The command line prints every error
in one place, `icae_fast.cli.app.main`, and there this table translates them.
"""

from __future__ import annotations

import re

# Options by argument of the library.
OPTIONS = {
    "base_model": "--model",
    "compression_rate": "--rate",
    "do_sample": "--temperature",
    "max_new_tokens": "--max-new-tokens",
    "memory_size": "--memory-size",
    "stop_strings": "--stop",
    "top_p": "--top-p",
}
# These are words of English, too, and are arguments only where a value follows.
_WORDS = {"dtype": "--dtype", "seed": "--seed", "temperature": "--temperature"}

# The option of a command that names the base model, where it is not --model.
_MODEL_OPTION = {"make-pwc": "--local"}
# Commands whose options are the keys of a YAML file.
_BY_FILE = ("pretrain", "finetune")

# Advice that only a Python caller can follow: (pattern, replacement); MODEL stands for the option of the base model.
_ADVICE = [
    (r"pass the base model's own tokenizer", "check the tokenizer in the folder of MODEL"),
    (r"pass (?:token ids or |return_ids=True or )?tokenizer=(?:\w+)?", "give a MODEL that has a tokenizer"),
    (r"pass base_model=(?:\w+)?", "give one with MODEL"),
    (r"pass the base model (?=it\b)", "give MODEL with the base model "),
    (r"pass that adapter", "give that one with --adapter"),
    (r"pass do_sample=True with (?:it|them)", "give --temperature or --seed"),
    (r", or set icae\.max_positions higher(?: if the base model extrapolates)?", ""),
    (r"restore it by restore_by_span", "restore it with --by-span"),
    (r"lower token_budget or ", ""),
    (
        r"pass memory_tokens=, the .* and compression_rate=",
        "convert it in Python with ICAE.from_pretrained and save_pretrained, and give that folder",
    ),
    (r"set icae\.chat_template_kwargs, ", ""),
    (r" at token_budget=\d+", ""),
    (r"MemoryStore\.rebuild\(path\)", "`icae-fast rebuild STORE`"),
    (r"see its keys\(\)", "see `icae-fast list`"),
]

# A name within a path, a quotation or another word is not an argument.
_NAME = r"(?<![\w./'\"-])({names})(?![\w/'\"-]|\.\w)"
_ARGUMENT = re.compile(_NAME.format(names="|".join(OPTIONS)) + "(=?)")
_WORD = re.compile(_NAME.format(names="|".join(_WORDS)) + "(=| (?=is ))")


def for_command_line(message: str, command: str) -> str:
    """Return a message of the library with its arguments replaced by options.

    Args:
        message: text of an `ICAEError`.
        command: name of the command that failed; `pretrain` and `finetune` take keys of a YAML file instead.
    """
    by_file = command in _BY_FILE
    model = "model.name" if by_file else _MODEL_OPTION.get(command, "--model")
    for pattern, replacement in _ADVICE:
        message = re.sub(pattern, replacement.replace("MODEL", model), message)
    if by_file:  # keys of the file are named like the arguments
        return message
    options = OPTIONS | {"base_model": model}
    message = _ARGUMENT.sub(lambda match: options[match[1]] + (" " if match[2] else ""), message)
    return _WORD.sub(lambda match: _WORDS[match[1]] + " ", message)
