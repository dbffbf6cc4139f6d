"""Adapters: small trained changes of frozen matrices. One file for each kind (LoRA in
`lora.py`; DoRA would be `dora.py`), one protocol for all, one table of their names.
"""
