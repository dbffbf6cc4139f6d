"""`python -m research.studio`: train, test and deploy in a browser.

The page owns nothing. A job is a process with a run directory, started through
`launch`; pages show the files of runs, and steer a run by the files of its requests. So
a server that is killed, a tab that is closed and a second tab change nothing.

  access.py      who may come in: token, cookie, Host and Origin, content policy
  roots.py       the folders that pages may show, and nothing outside of them
  app.py         all pages together; errors as a page or as JSON
  pages/         one file a page: its routes, and what they read
  listing/       run directories: their state, loss, size, notes, trash
  live/          the lines of metrics.jsonl as they come, thinned for charts
  jobs/          the queue of this machine, and the process that works it off
  static/        styles, ES modules, and vendored libraries; there is no build step
"""
