"""What a pruning run did: the record (:mod:`schema`), its HTML page and model card (:mod:`render`, :mod:`plots`)."""
