"""Files of other tools, read and written: Hugging Face folders, PEFT, llama.cpp."""
