"""`python -m research.serve`: an OpenAI server that answers with the models of runs."""
