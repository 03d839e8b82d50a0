"""What a run would need on ranks that one does not have: the program itself, run on fake tensors and fake ranks."""
