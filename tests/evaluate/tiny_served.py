"""A random model with a window of 128 and a tokenizer of 2000 pieces, trained on what the tasks ask, that puts BOS before a text."""

from __future__ import annotations

from pathlib import Path

from checkpoints import write as write_checkpoint
from mistral_evaluate.suites import TASKS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PIECES = 2000


def write(folder: Path) -> Path:
    """Write weights and tokenizer."""
    write_checkpoint(folder, vocab_size=PIECES, hidden_size=64, sliding_window=128, max_position_embeddings=4096)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [str(row) for task in TASKS.values() for row in task.rows()]
    tokenizer.train_from_iterator([*texts, *(f" {letter}" for letter in "ABCD" * 2000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder
