"""Makes tokenizers, of bytes alone or trained on text, and saves them."""

import json
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from research.core.atomic_files import make_folder, write_whole
from research.core.errors import UserError
from research.tokenize.tokenizer import Tokenizer

END = "<|endoftext|>"
SMALLEST = 257  # All bytes, and END.


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with one id for each byte, and one for the end of a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(END, normalized=False)])
    return Tokenizer(inner, bos=None, eos=END)


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE that splits text as GPT-2, and every digit apart.

    The same texts give the same tokenizer. Sennrich et al. 2016, arXiv:1508.07909;
    the bytes: Radford et al. 2019 (GPT-2), section 2.2.

    Raises:
      UserError: `vocab_size` has no room for every byte.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"a vocabulary of {vocab_size} ids is too small: the 256 bytes and the end "
            f"of a document need {SMALLEST}; set at least that, or use byte"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[tokenizers.AddedToken(END, normalized=False)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, bos=None, eos=END)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the two JSON files that `transformers` and `from_folder` read.

    Raises:
      OSError: the folder cannot be written.
    """
    make_folder(folder)
    rules = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    starts = rules.encode("a").ids[:1]
    if tokenizer.add_bos and starts != [tokenizer.bos]:
        # A GGUF file has this beside the rules, a tokenizer.json within them.
        rules.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.bos_token} $A",
            special_tokens=[(tokenizer.bos_token, tokenizer.bos)],
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        **tokenizer.settings,
        "bos_token": tokenizer.bos_token or None,
        "eos_token": tokenizer.eos_token or None,
    }
    if tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    write_whole(folder / "tokenizer.json", rules.to_str(pretty=True))
    text = json.dumps(settings, indent=2, ensure_ascii=False)
    write_whole(folder / "tokenizer_config.json", text)
