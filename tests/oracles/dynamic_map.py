"""The dynamic tree map of "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861), bit by bit.

A code is: a sign bit (signed map), a run of zeros (the decimal exponent), a one (the indicator), and a linear fraction
of the bits that are left: the midpoints of equal parts of [0.1, 1].
"""


def dynamic_map(signed: bool, bits: int = 8) -> list[float]:
    payload = bits - 1 if signed else bits
    values = [0.0, 1.0]
    for zeros in range(payload):
        fraction_bits = payload - 1 - zeros
        parts = 2**fraction_bits
        for k in range(parts):
            low, high = 0.1 + 0.9 * k / parts, 0.1 + 0.9 * (k + 1) / parts
            value = 10.0**-zeros * (low + high) / 2
            values.append(value)
            if signed:
                values.append(-value)
    if signed:
        return sorted(values)
    # Unsigned maps have 7 exponents, not 8: the shortest fraction has two values, and the count comes out at 2 ** bits.
    smallest = 10.0 ** -(payload - 1) * 0.55
    return sorted(v for v in values if abs(v - smallest) > 1e-12)
