"""A tokenizer of fewer tokens than the small models know, whose texts grammars can be tried on."""

import functools

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gdnjax.serving.parsing import THINK_CLOSE, THINK_OPEN
from gdnjax.serving.tokenizer import Tokenizer
from tests.micro import MICRO

TEXT = "no nothing north south 0123456789 10 12 yes yesterday [a, b] é {} \n ab abc cab"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2


@functools.cache
def tokenizer_of(tags: bool = True) -> Tokenizer:
    """Of fewer tokens than MICRO's vocabulary, bytes of a few letters and merges of them; with the tags or without."""
    hf = tokenizers.Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=90,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=list("<>/think"),
        show_progress=False,
    )
    hf.train_from_iterator([TEXT], trainer)
    if tags:
        hf.add_tokens([THINK_OPEN, THINK_CLOSE])
    found = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=hf, eos_token=SPECIAL[EOS]))
    assert 60 < found.vocab_size < MICRO.vocab_size
    return found
