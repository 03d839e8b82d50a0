"""Text to rows: `corpus.py` puts the parts together; a row is one sample, and so the unit of privacy."""
