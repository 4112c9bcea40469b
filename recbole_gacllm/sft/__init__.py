"""The paper's first module: LoRA fine-tuning on matched pairs."""
