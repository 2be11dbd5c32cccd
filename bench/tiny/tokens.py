"""A byte-level BPE for Python text; newline and indentation are pieces of their own, so a prompt may end at either."""

from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|end|>"
MAX_POSITIONS = 1024

# In order: one newline; a line's whole indentation; a name with what leads it in (space, dot or underscores); one
# digit; a run of punctuation; dots; underscores; other blanks. A piece is the longest that a BPE entry can grow to.
PIECES = r"\n|(?<=\n) +|[ .]?_*\p{L}+|[0-9]| ?[^\s\p{L}\p{N}_.]+| ?\.+| ?_+|\s"


def train_tokenizer(texts: Iterable[str], entries: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `entries` entries, all 256 bytes and `<|end|>` (end of text and padding) among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=entries,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, int64 [length], closed by the end token."""
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]  # quiet about texts longer than the model
    return [np.array([*ids, tokenizer.eos_token_id], dtype=np.int64) for ids in encoded]
