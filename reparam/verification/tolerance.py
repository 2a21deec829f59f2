"""What rounding explains.

    tolerance = MARGIN · max( u · √depth,  r )

- u is half the eps of the coarsest floating point type among the numbers of both models and of the run: the largest
  error of rounding one number. In a run in float64 it is still that of the type in which the weights are stored, as
  fused weights were rounded to that type.
- depth counts the rounding operations on the longest path from the input. Each is off by up to u, relative to its
  largest result; the errors are as good as independent, so that their sum grows with the root of the number. A product
  that adds up many terms counts for more, see `reparam.verification.depth`.
- r is measured: how far the first model is from itself when every one of its numbers is off by u, up or down at
  random. It exceeds u · √depth where values cancel, or where a model amplifies what it is given; it amplifies a fault
  alike.
- MARGIN covers that two models round, and that the largest of many errors is looked at. Over 15 families of timm, in
  float32 and bfloat16, the largest difference was 1.1 times what stands in the brackets, chaotic nets aside.
"""

from typing import Final

MARGIN: Final = 4.0


def tolerance(eps: float, depth: float, moved: float) -> tuple[float, str]:
    """The relative difference that rounding explains.

    Args:
        eps: of the coarsest type.
        depth: rounding operations on the longest path.
        moved: r of the equation above; infinity and NaN count as 0.

    Returns:
        The tolerance, and how it came about.

    >>> tolerance(2.0**-23, 100, 0.0)
    (2.384185791015625e-06, '4 × 6.0e-08 × √100 operations')
    """
    finite = moved if moved < float("inf") else 0.0
    formula = eps / 2 * max(depth, 1) ** 0.5
    if finite > formula:
        return MARGIN * finite, f"{MARGIN:g} × {finite:.1e}, by which other roundings of its numbers move a"
    return MARGIN * formula, f"{MARGIN:g} × {eps / 2:.1e} × √{max(depth, 1):.0f} operations"
