"""CMI-MTL for medical visual question answering. The one module that is written by hand; the others come from nbs/."""
import os

__version__ = "0.1.0"

# Waiting threads of OpenMP shall sleep, not spin: beside another busy process spinning costs a factor of 10 to 20.
# libgomp reads this when torch is loaded, so it helps where torch comes later, and in every process started from here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
