"""Every knob of a run, with its default, choices and range, and the command line that
sets it. Imports `core` only.
"""

from research.config.run_config import defaults as defaults
