"""Private training beside plain training and Opacus, in one process group and one run: ``python -m fsdp_dp.benchmark``."""
