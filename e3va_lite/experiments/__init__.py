"""The paper beside ours: its tables, its comparison in miniature, and the weights in miniature. Only the command
line imports it."""
