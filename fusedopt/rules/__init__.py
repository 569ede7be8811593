"""One file per update rule: declaration, host scalars, reference, Triton body, optimizer class."""
