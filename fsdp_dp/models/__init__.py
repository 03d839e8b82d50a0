"""Readable models that train privately: `config.py` (their shape, no torch) and `gpt.py` (the decoder; torch alone)."""
