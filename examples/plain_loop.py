"""LoRA in a loop of one's own.

python examples/plain_loop.py --data stories.jsonl      rows: {"text": "…"}
"""

import argparse
import itertools

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="meta-llama/Llama-2-7b-hf")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--out", default="adapter")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map=device)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model = fastlora.patch(model)


def collate(rows):
    batch = tokenizer([row["text"] for row in rows], truncation=True, max_length=512, padding=True, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


rows = load_dataset("json", data_files=args.data, split="train")
batches = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
model.train()
for step, batch in zip(range(args.steps), itertools.chain.from_iterable(itertools.repeat(batches)), strict=False):
    with torch.autocast(device, torch.bfloat16):
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")

print(fastlora.explain(model))
model.save_pretrained(args.out)
