"""Language models in JAX: pre-training, fine-tuning with LoRA, and what it takes to
trust a run.
"""
