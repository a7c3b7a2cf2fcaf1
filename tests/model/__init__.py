import klein.inference  # noqa: F401  (before torch, for OMP_WAIT_POLICY)
