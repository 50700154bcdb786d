"""What the gradient does and what it costs: proofs, paths, bytes, seconds, and their figures."""
