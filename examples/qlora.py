"""QLoRA: LoRA over a base that bitsandbytes keeps in 4 bits.

pip install bitsandbytes
python examples/qlora.py --data chats.jsonl      rows: {"messages": [{"role": "user", "content": "…"}, …]}
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import fastlora

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="meta-llama/Llama-2-7b-chat-hf")
parser.add_argument("--data", required=True, help="JSON lines")
parser.add_argument("--out", default="adapter")
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

quantised = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=quantised, device_map={"": device})
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
model = fastlora.patch(model)

trainer = SFTTrainer(
    model,
    args=SFTConfig(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        max_length=1024,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=load_dataset("json", data_files=args.data, split="train"),
)
trainer.train()
print(fastlora.explain(model))
trainer.save_model(args.out)
