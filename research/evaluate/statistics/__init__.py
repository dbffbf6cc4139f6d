"""How sure a difference between two models is: intervals, tests and words for them."""
