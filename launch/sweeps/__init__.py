"""Ablation sweeps: many runs that answer one question.

spec        what a sweep file says: a config, axes, seeds, a metric
runs        the runs that it comes to, each with its folder and command
units       which of them train as one program
worker      trains what is not done on this machine, beside any other worker
results     what the runs have written down
statistics  means, intervals and paired differences
plots, page the report
"""
