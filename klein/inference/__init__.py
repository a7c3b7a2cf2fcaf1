"""The model at work: the only package that imports torch and diffusers."""

import os
import sys

# OpenMP threads that spin while they wait starve whatever else runs on the same cores. torch's
# OpenMP reads this once, when it is loaded.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
