"""Report of a pruning run: the record (:mod:`schema`), its HTML page and model card (:mod:`render`, :mod:`plots`)."""
