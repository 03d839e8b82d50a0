"""Text and images to rows: `corpus.py` puts the parts together; a row is one sample, and so the unit of privacy.

Sources: `python_source.py`, `text_files.py`, `hugging_face.py`, `images.py` (digits, torchvision). Rows: `rows.py` (what a
data set is), `packing.py` (documents to rows). Optional packages are imported where they are used.
"""
