from attncc.demo_data import document_ids, packed_rows


def test_rows_are_full_of_real_files_and_differ():
    rows = packed_rows(batch=3, length=5000)
    for row in rows:
        ids = document_ids(row)
        assert len(ids) == 5000
        assert ids == sorted(ids)
        assert all(document.name.endswith(".py") and document.length > 0 for document in row)
    assert len(set(rows)) == 3


def test_the_seed_decides():
    assert packed_rows(1, 1000, seed=1) == packed_rows(1, 1000, seed=1)
    assert packed_rows(1, 1000, seed=1) != packed_rows(1, 1000, seed=2)


def test_no_tokens_need_no_documents():
    assert packed_rows(2, 0) == ((), ())
