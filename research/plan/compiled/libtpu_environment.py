"""Environment variables of a plan, which let libtpu compile without a TPU.

They must be set before JAX starts.
"""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # A plan is of the arrays that a run has, see `parallel.runtime`.
    "JAX_ENABLE_X64": "0",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    # Otherwise libtpu asks Google's metadata server, which does not exist here.
    "TPU_SKIP_MDS_QUERY": "1",
    # Two plans may run at once, because neither uses a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
