"""Every file of cases, in the order of docs/misuse.md: to import this registers them all."""

import importlib

for name in ("mpi", "torch", "tensorflow", "command"):
    importlib.import_module(f"tests.misuse_{name}_cases")
