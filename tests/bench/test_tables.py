from __future__ import annotations

import pytest

from bench import tables


def test_the_tables_of_the_docs_are_what_the_rows_say():
    texts = [path.read_text(encoding="utf-8") for path in tables.DOCS]
    assert tables.filled(texts) == texts, "run python -m bench.tables"


def test_a_figure_that_was_typed_is_found_and_so_is_a_table_that_went():
    texts = [path.read_text(encoding="utf-8") for path in tables.DOCS]
    typed = [text.replace("| 1.00 x |", "| 9.99 x |", 1) for text in texts]
    assert typed != texts
    assert tables.filled(typed) == texts
    with pytest.raises(LookupError, match="expected the tables"):
        tables.filled([text.replace("table: cpu", "table: gpu") for text in texts])
    with pytest.raises(LookupError, match="got none"):
        tables.found("step", model="70b")
