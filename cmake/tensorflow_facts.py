"""Prints what it takes to compile against the installed TensorFlow, separated by ";": version, C++ standard, flags...

Fails with a sentence when there is none.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    import tensorflow as tf
except Exception as error:  # an installation that is broken fails in many ways
    sys.exit(f"TensorFlow cannot be imported: {error}")
flags = tf.sysconfig.get_compile_flags()
standard = next((flag.rpartition("+")[2] for flag in flags if flag.startswith("--std=")), "17")
print(
    tf.__version__, standard, *(f for f in flags if not f.startswith("--std=")), *tf.sysconfig.get_link_flags(), sep=";"
)
