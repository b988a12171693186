"""The demo's base model: a small Llama and a tokenizer, both made on the spot from the rows of a set."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SEED = 0
VOCABULARY = 2048
LENGTH = 128
BATCH = 8


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer trained on `texts`, with Llama's <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", padding_side="left")


def make_base(texts: Sequence[str], steps: int, path: Path, on_step: Callable[[int, float], None]) -> None:
    """Train a four-layer Llama from random weights on `texts` and save it with its tokenizer in `path`.

    Plain text, no chat format, every weight trains: what a base model is to the LoRA that follows.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(texts)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps))
    encoded = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    shuffle = random.Random(SEED)
    for step in range(steps):
        tokens: list[int] = []
        while len(tokens) < BATCH * LENGTH:
            tokens += encoded[shuffle.randrange(len(encoded))]
        batch = torch.tensor(tokens[: BATCH * LENGTH]).view(BATCH, LENGTH)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
