"""An LLM of random weights in a published size, with a stand-in for its tokenizer; and texts to ask it."""

import random
import string
from typing import Any

TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""

BATCHED_TOKENS = 8192
"""Prompt tokens of a step."""

BLOCK = 16
AROUND = 64
"""Tokens that a template puts around a text, at most."""


def tokenizer_of(vocab_size: int) -> Any:
    """A byte-level Tokenizer of as many tokens: the bytes, and words of two to eight letters. It merges nothing: a text
    has a token for each of its bytes, while what is generated costs as much to write down as a real one's does.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    from gdnjax.serving.tokenizer import Tokenizer

    rng = random.Random(vocab_size)
    names = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    if vocab_size < len(names):
        raise ValueError(f"a byte-level tokenizer has at least {len(names)} tokens, and {vocab_size} were asked for")
    while len(names) < vocab_size:
        # The blank in front of a word, as byte-level vocabularies have it.
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8)))
        names[f"\u0120{word}"] = None
    ids = {name: token_id for token_id, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(ids, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    hf = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, chat_template=TEMPLATE
    )
    return Tokenizer(hf)


def texts(count: int, length: int, seed: int) -> list[str]:
    """As many texts of `length` bytes; no two begin alike."""
    rng = random.Random(seed)
    return ["".join(rng.choices(string.ascii_lowercase + " ", k=length)) for _ in range(count)]


def make_llm(preset: str, streams: int, input_len: int, tokens: int) -> Any:
    """A warmed-up LLM with room for `streams` requests of `input_len` bytes and `tokens` output tokens."""
    from gdnjax import LLM
    from gdnjax.assets import config_file
    from gdnjax.cli.bench.serving.engines import load_random
    from gdnjax.config import EngineConfig, ModelConfig

    config = ModelConfig.from_hf(config_file(preset))
    longest = input_len + AROUND + tokens
    blocks = -(-longest // BLOCK)
    loaded = load_random(config, {"tensor_parallel_size": 1, "dtype": "auto"}, seed=0, mtp=False)
    engine = EngineConfig(
        max_num_seqs=streams,
        max_model_len=blocks * BLOCK,
        max_num_batched_tokens=BATCHED_TOKENS,
        block_size=BLOCK,
        num_kv_blocks=(streams + 2) * blocks,
        num_checkpoint_slots=2 * streams,
        decode_buckets=(*sorted({1, streams}),),
        max_logit_rows=1,
    )
    tokenizer = tokenizer_of(config.vocab_size)
    return LLM.from_model(loaded.model, loaded.params, engine, max_model_len=blocks * BLOCK, tokenizer=tokenizer)
