"""Models that train privately: `config.py` (their options, no torch), `build.py` (from options to a model), `gpt.py`,
`llama.py`, `resnet.py` (written to be read; torch alone), `hugging_face.py` (`transformers` and `peft`), `objective.py` (loss
and score of a row).
"""
