"""Public benchmarks in the formats of their own files: LongBench v1 and v2, ZeroSCROLLS, RULER, BABILong."""
