"""What bounds epsilon of a composition: one file an accountant, over `mechanism`; `accounting` chooses and falls back."""
