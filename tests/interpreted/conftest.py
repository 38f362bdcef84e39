"""Kernels run on the CPU by Triton's interpreter, which must be chosen before Triton is imported.

`make test` runs this folder on its own, with TRITON_INTERPRET=1; other runs leave it out.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
