"""Pretrained backbones: their common interface, and one module per family."""
