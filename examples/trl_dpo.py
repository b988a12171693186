"""LoRA on preferences with TRL's DPOTrainer. The reference is the model with its adapter disabled.

python examples/trl_dpo.py --data pairs.jsonl      rows: {"prompt": "…", "chosen": "…", "rejected": "…"}
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

import fastlora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="meta-llama/Llama-2-7b-chat-hf")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--out", default="adapter")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

model = fastlora.patch(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16))
trainer = DPOTrainer(
    model,
    args=DPOConfig(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-5,
        max_length=1024,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
    peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
print(fastlora.explain(trainer.model))
trainer.save_model(args.out)
