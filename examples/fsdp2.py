"""LoRA in a loop of one's own, the weights sharded over the GPUs by PyTorch's FSDP2.

torchrun --nproc_per_node 8 examples/fsdp2.py --data stories.jsonl      rows: {"text": "…"}
"""

import argparse
import itertools

import torch
import torch.distributed as dist
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastlora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="meta-llama/Llama-2-13b-hf")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--out", default="adapter")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

kind = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if kind == "cuda" else "gloo")
device = torch.device(kind, dist.get_node_local_rank() if kind == "cuda" else None)
if kind == "cuda":
    torch.cuda.set_device(device)

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.eos_token
torch.manual_seed(0)  # every rank makes the same adapter
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model = fastlora.patch(model)  # before or after fully_shard

# The layer is the unit. Adapters stay fp32 and are gathered in bf16; their gradients are summed in fp32.
options = {
    "mesh": init_device_mesh(kind, (dist.get_world_size(),)),
    "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
}
for layer in model.base_model.model.model.layers:
    fully_shard(layer, **options)
fully_shard(model, **options)


def collate(rows):
    batch = tokenizer([row["text"] for row in rows], truncation=True, max_length=512, padding=True, return_tensors="pt")
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


rows = load_dataset("json", data_files=args.data, split="train")
batches = DataLoader(rows, batch_size=4, sampler=DistributedSampler(rows), collate_fn=collate, drop_last=True)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-4)
model.train()
for step, batch in zip(range(args.steps), itertools.chain.from_iterable(itertools.repeat(batches)), strict=False):
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss.item():.4f}")

# Whole tensors, of the adapter alone: a plain PEFT adapter.
whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
state = get_model_state_dict(model, options=whole)
if dist.get_rank() == 0:
    print(fastlora.explain(model))
    model.save_pretrained(args.out, state_dict=state)
dist.destroy_process_group()
