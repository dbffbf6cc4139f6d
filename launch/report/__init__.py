"""`python -m launch.report`: what came out of a sweep, as HTML and Markdown."""
