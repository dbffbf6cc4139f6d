"""Two processes that train one run, and what makes one of them hang."""

MESH = ("--config.mesh.fsdp=2", "--config.mesh.context=2")


PLAIN = ("--config.export=False", "--config.text.cache_dir=tokens-of-two")


# Seconds: a busy machine compiles, without a sign of life, for twenty.
LIMIT = 45


PAIR = ("--config=pretrain.py", *MESH, *PLAIN, f"--config.runtime.watchdog_s={LIMIT}")


def start_pair(place, run, *flags, **options):
    where = f"--config.run_dir=runs/{run}"
    return place.start_together(2, *PAIR, where, *flags, **options)


HANG = """
import time
from research.train.programs import device_batches
pull = device_batches.DeviceBatches.__next__
def hang(self):
    if self.number == 2:
        {what}
    return pull(self)
device_batches.DeviceBatches.__next__ = hang
"""
