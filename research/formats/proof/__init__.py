"""The proof that written files compute what the model of a run computes."""
