"""The fine-tuning methods under one contract."""
