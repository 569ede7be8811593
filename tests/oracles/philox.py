"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one counter at a time."""

MASK = 0xFFFFFFFF


def philox4x32(counter: tuple, key: tuple, rounds: int = 10) -> tuple:
    """Four 32-bit words of a 128-bit counter and a 64-bit key."""
    r0, l0, r1, l1 = counter
    k0, k1 = key
    for i in range(rounds):
        if i:
            k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
        p0, p1 = 0xD2511F53 * r0, 0xCD9E8D57 * r1
        r0, l0, r1, l1 = (p1 >> 32) ^ l0 ^ k0, p1 & MASK, (p0 >> 32) ^ l1 ^ k1, p0 & MASK
    return r0, l0, r1, l1
