"""`python -m launch.sweep`: trains every run that a sweep file describes."""

from launch.sweep.sweep_spec import Sweep as Sweep
from launch.sweep.sweep_spec import choice as choice
from launch.sweep.sweep_spec import grid as grid
from launch.sweep.sweep_spec import listed as listed
from launch.sweep.sweep_spec import log as log
from launch.sweep.sweep_spec import sampled as sampled
from launch.sweep.sweep_spec import uniform as uniform
