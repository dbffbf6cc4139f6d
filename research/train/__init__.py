"""`python -m research.train`: one run, or a pack of runs, from config to report.

Read `start_to_report.py` first. It calls, in this order:

  prepare_runs.py   opens base model, data and adapters; `doctor.py` examines them
  restore_run.py    reads the newest intact checkpoint
  fit_runs.py       evaluates, saves, samples and logs around the steps
  training_loop.py  the order of these things, with no knowledge of models
  run_saver.py      a save, and what a failed save does
  finish_run.py     exports, answers, reports

`programs/` says how runs share the devices, `step/` is the compiled update, and
`metrics/` is what is measured. One run is a pack of one: all of this takes lists.
"""
