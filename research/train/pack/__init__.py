"""Several LoRA runs as one program: padded adapters, stacked state, one step."""
