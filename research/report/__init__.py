"""Data turned into what people look at: terminal tables, progress, plots, Markdown."""
