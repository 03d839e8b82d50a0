"""The Hydra configuration, shipped as the package `fsdp_dp.conf`; its types are in `fsdp_dp/training/schema.py`."""
