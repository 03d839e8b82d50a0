"""Reports on runs that are there: reading (`run`), the privacy statement, figures, and the page as Markdown and HTML."""
