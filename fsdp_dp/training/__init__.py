"""The application behind `python -m fsdp_dp.train`.

In reading order: `schema.py` (the configuration), `app.py` (one run from start to end), `world.py` (ranks and
meshes), `building.py` (the sharded model, the optimizer, the engine), `batches.py`, `loop.py`, `diagnostics.py` (what
is outside the guarantee), `evaluate.py`, `budget.py` (ε by step), `fellows.py` and `interrupt.py` (failures and
signals), and what a run leaves behind: `run_folder.py`, `metrics.py`, `figure.py`, `report.py`. Checkpoints and the
ledger are the library's own: `fsdp_dp.checkpoint`, `fsdp_dp.ledger`.

Nothing here sees OmegaConf: `fsdp_dp/train.py` turns it into the dataclasses of `schema.py`.
"""
