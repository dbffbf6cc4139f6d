"""The sources of models: exports that name their step, runs that build on runs."""
