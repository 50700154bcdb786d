"""The equations of the highway and of the frozen stream, computed fast."""
