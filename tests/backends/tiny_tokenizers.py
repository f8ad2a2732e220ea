"""Real tokenizers, small enough to be trained by the test session: no file from outside."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = [
    "A forebay is the basin from which a turbine takes its water.",
    "The quick brown fox jumps over 13 lazy dogs.",
    "Straße, naïve, coöperate: ünïcödé 日本語 お誕生日おめでとう 👩‍👩‍👧",
] * 4


def byte_level(path: Path, special_tokens: list[str]) -> Path:
    """As Llama 3, Qwen and SmolLM2 have them: bytes are the alphabet."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(path))
    return path


def byte_fallback(path: Path, special_tokens: list[str]) -> Path:
    """As Llama 2, Mistral and Gemma have them: words begin with ▁, characters beyond the alphabet are bytes."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=[*special_tokens, "<unk>", *fallback], limit_alphabet=40, show_progress=False
    )
    trained.train_from_iterator(SENTENCES, trainer)
    # the byte tokens were special for training only, so that they are in the vocabulary; in a text they are plain
    tokenizer = Tokenizer(trained.model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.save(str(path))
    return path
