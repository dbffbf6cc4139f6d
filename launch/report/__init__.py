"""`python -m launch.report`: compares the runs of a sweep, as HTML and Markdown."""
