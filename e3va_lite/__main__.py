"""``python -m e3va_lite``, and ``torchrun ... -m e3va_lite``: the console command ``e3va``."""

from .cli import main

main()
