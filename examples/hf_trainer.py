"""LoRA with transformers' Trainer.

python examples/hf_trainer.py --data stories.jsonl      rows: {"text": "…"}
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import fastlora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="meta-llama/Llama-2-7b-hf")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--out", default="adapter")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model = fastlora.patch(model)

rows = load_dataset("json", data_files=args.data, split="train")
rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=rows.column_names)
trainer = Trainer(
    model,
    TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-4,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=rows,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
print(fastlora.explain(model))
trainer.save_model(args.out)
