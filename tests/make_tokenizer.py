"""A small byte-level BPE tokenizer, trained on the spot, that completes the checkpoint directories of tests."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}
{{ '<think>\n\n</think>\n\n' }}
{%- endif -%}
{%- endif -%}
"""

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A recurrent state is read once and written once in every step of the engine.",
    "One request, one slot; one slot, one state. What the state forgets, the attention layers may remember.",
    "def add(left, right):\n    return left + right\n\nprint(add(2, 40))  # prints 42\n",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis.",
    "你好，世界。今天天气很好，我们去公园散步吧。你好，朋友。",
    "こんにちは世界。吾輩は猫である。名前はまだ無い。",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Emoji are long: 😀 😃 😄 🚀 🚀🚀 👩‍🚀 👍🏽 🇪🇺 ❤️.",
)


def write_tokenizer(directory: pathlib.Path, vocab_size: int = 400) -> None:
    """Writes tokenizer.json and tokenizer_config.json: ChatML, EOS is <|im_end|>, the special ids are 0, 1 and 2.

    `vocab_size` counts special tokens, the 256 bytes and the merges. Raises a ValueError where the sentences cannot
    give exactly that many.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=1,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"vocab_size={vocab_size} cannot be had: training gives {tokenizer.get_vocab_size()}")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
