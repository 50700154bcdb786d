"""Backbones inside models of other libraries: how each is taken apart into stages, and how it answers afterwards."""
