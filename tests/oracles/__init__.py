"""Independent transcriptions of published definitions, for what no package provides."""
