"""Tokenizers of every kind, trained on the spot: text in several scripts, cut into tokens, and back."""

from functools import cache
from typing import Any

TEXTS = [
    "The girl was happy that he saw the old café near the river, and she was there.",
    "世界 is the world; Straße, naïve, Привет мир, 日本語 and \U0001f600\U0001f600 too!",
    "He was the one. She was not. They were (both) here, 17 times or 2048?\nA new line\tand a tab.",
] * 4


def _wrap(tokenizer: Any, **names: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def byte_level(add_prefix_space: bool = False) -> Any:
    """GPT-2's kind: characters beyond ASCII are several tokens where no merge was learned."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@cache
def byte_fallback() -> Any:
    """Llama's kind: SentencePiece pieces, and the 256 bytes for characters without one."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = ["▁", "▁the", "▁was", "was", "he", "▁he", "a", "A", "t", "s", "r", "i", "n", "e", "▁c", "f", "c", "\u2019"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "c")]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


@cache
def wordpiece() -> Any:
    """BERT's kind: small letters, accents taken off, ## inside words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return _wrap(tokenizer, **names, mask_token="[MASK]")


@cache
def unigram() -> Any:
    """T5's kind: SentencePiece without bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def slow_bytes() -> Any:
    """A tokenizer in Python, without offsets: ByT5's."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer(extra_ids=3)


@cache
def gemma() -> Any:
    """Gemma's kind: as Llama's, without a space in front, and tokens of several spaces and lines."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    words = ["▁", "▁the", "▁was", "was", "he", "▁he", "a", "A", "t", "s", "▁c", "c", "▁▁", "▁▁▁", "\n", "\n\n", "\t"]
    names = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "c"), ("▁", "▁"), ("▁▁", "▁"), ("\n", "\n")]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _wrap(tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>")


@cache
def word_ends() -> Any:
    """CLIP's kind: a mark on the last piece of a word, so that pieces with and without it read alike."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def unigram_bytes() -> Any:
    """Unigram with the 256 bytes for characters without a piece, as newer SentencePiece models have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [(word, -2.0 - i / 10) for i, word in enumerate(["▁", "▁the", "the", "▁was", "was", "e", "h", "t"])]
    pieces = [(name, 0.0) for name in ("<unk>", "<s>", "</s>")]
    pieces += [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *words], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def added() -> Any:
    """GPT-2's kind with tokens added by a user: special, of spaces only, and such that look like numbers and bytes."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    twin = Tokenizer.from_str(byte_level()._tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=twin, bos_token="<|endoftext|>")
    names = ["<think>", "café", "<17>", "<0x41>"]
    spaced = [AddedToken("  ", normalized=False), AddedToken(" spaced ", lstrip=True, rstrip=True)]
    tokenizer.add_tokens([AddedToken("<|user|>", special=True), *spaced, *map(AddedToken, names)])
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "byte-level, space in front": lambda: byte_level(True),
    "byte fallback": byte_fallback,
    "WordPiece": wordpiece,
    "Unigram": unigram,
    "slow": slow_bytes,
}
FURTHER = {"Gemma": gemma, "word ends": word_ends, "Unigram, bytes": unigram_bytes, "added tokens": added}
"""kinds that say more of how tokens are named than of how text is cut"""
