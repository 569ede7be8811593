"""Codes of the state formats, one file a format: the Triton twins of csrc/formats/*.h, which define them.

Each file has decode(code, scale, SIGNED) -> fp32 and encode(x, inverse, top, SIGNED) -> code, element by element. inverse
is 1 / scale. top is what a NaN or an infinity counts as: the format's TOP, its largest value; both are 0 where scale is 0.
"""
