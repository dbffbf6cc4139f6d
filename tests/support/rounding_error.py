"""How far logits in bfloat16 are from those of the same weights in float32."""

import numpy as np


def rounding_error(found, exact):
    """The median over positions of the relative difference; arrays `[..., vocab]`.

    A token near a tie of two experts may have another one after rounding, which moves
    its logits by more than rounding does. The median does not see a few of them.
    """
    found, exact = (np.asarray(x, np.float64) for x in (found, exact))
    size = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    return float(np.median(size))
