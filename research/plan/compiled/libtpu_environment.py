"""Environment variables that let libtpu compile on a machine without a TPU.

They must be set before JAX starts.
"""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Otherwise libtpu asks Google's metadata server, which does not exist here.
    "TPU_SKIP_MDS_QUERY": "1",
    # Two plans may run at once, because neither uses a TPU.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
