"""A model by name: its files, tokenizer, sampling defaults and tensors."""
