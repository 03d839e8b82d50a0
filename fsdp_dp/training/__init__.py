"""The application behind `python -m fsdp_dp.train`.

In reading order: `schema.py` (the configuration), `app.py` (one run from start to end), `world.py` (ranks and meshes),
`building.py` (the sharded model, the optimizer, the engine), `batches.py`, `loop.py`, `evaluate.py`, `budget.py` (ε by
step) and what a run leaves behind: `metrics.py`, `checkpoint.py`, `figure.py`, `report.py`.

Nothing here sees OmegaConf: `fsdp_dp/train.py` turns it into the dataclasses of `schema.py`.
"""
