"""What must be set before JAX starts, so that libtpu compiles and looks for no TPU."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Else it asks the metadata server of a machine that is none of Google's.
    "TPU_SKIP_MDS_QUERY": "1",
    # No TPU is taken: two plans may run at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
