"""LoRA in a loop of one's own, the weights sharded over the GPUs by DeepSpeed's ZeRO-3.

torchrun --nproc_per_node 8 examples/deepspeed_zero3.py --data stories.jsonl      rows: {"text": "…"}
"""

import argparse
import itertools
import json
from pathlib import Path

import deepspeed
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import fastlora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="meta-llama/Llama-2-70b-hf")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--out", default="adapter")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--config", default=str(Path(__file__).parent / "configs" / "deepspeed_zero3.json"))
args = parser.parse_args()

deepspeed.init_distributed()
config = json.loads(Path(args.config).read_text())
shard_while_loading = HfDeepSpeedConfig(config)  # for from_pretrained, as long as this object lives

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.eos_token
torch.manual_seed(0)  # every rank makes the same adapter
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model = fastlora.patch(model)
# The configuration makes the decoder layer what is gathered at once, and DeepSpeed hooks its input's gradient.
model.enable_input_require_grads()


def collate(rows):
    batch = tokenizer([row["text"] for row in rows], truncation=True, max_length=512, padding=True, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


rows = load_dataset("json", data_files=args.data, split="train")
size = config["train_micro_batch_size_per_gpu"]
batches = DataLoader(rows, batch_size=size, sampler=DistributedSampler(rows), collate_fn=collate, drop_last=True)
trained = [p for p in model.parameters() if p.requires_grad]
engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
engine.train()
for step, batch in zip(range(args.steps), itertools.chain.from_iterable(itertools.repeat(batches)), strict=False):
    loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()}, use_cache=False).loss
    engine.backward(loss)
    engine.step()
    if engine.global_rank == 0:
        print(f"step {step}: loss {loss.item():.4f}")

# Whole tensors, of the adapter alone: a plain PEFT adapter.
state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
if engine.global_rank == 0:
    print(fastlora.explain(model))
    model.save_pretrained(args.out, state_dict=state)
