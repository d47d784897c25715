"""PRIMME: products that it spends on a matrix; ``python with_primme.py matrix.npy k tol`` prints two counts.

``tol`` is relative to the norm of the matrix: whoever wants residuals relative to each eigenvalue has to know the
smallest wanted one beforehand, and here it is given.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import primme

A, k, tol = np.load(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
counts = {}
for name, options in (("primme", {"ncv": 2 * k + 96}), ("primme default", {})):
    values, vectors, stats = primme.eigsh(
        A, k, which="LA", tol=tol, maxBlockSize=16, return_stats=True, method="PRIMME_GD_plusK", **options
    )
    residuals = np.linalg.norm(A @ vectors - vectors * values, axis=0)
    assert residuals.max() <= 1.01 * tol * np.linalg.norm(A, 2), "it did not converge"
    counts[name] = int(stats["numMatvecs"])
print(json.dumps(counts))
