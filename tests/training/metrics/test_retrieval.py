import numpy as np

from training.metrics.retrieval import recalled, retrieval


def test_ranks_are_the_places_of_the_own_partner_both_ways():
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 40, 6))
    texts += images
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    cosines = unit[0] @ unit[1].T
    found = retrieval(images * 3.0, texts)
    for i in range(40):
        assert found.caption_rank[i] == (cosines[i] > cosines[i, i]).sum()
        assert found.picture_rank[i] == (cosines[:, i] > cosines[i, i]).sum()
    assert recalled(found.caption_rank, 5).mean() == (found.caption_rank < 5).mean()


def test_equal_embeddings_count_against_the_partner():
    """A model that sees no difference between pictures finds nothing, rather than everything."""
    texts = np.random.default_rng(1).standard_normal((4, 6))
    assert retrieval(np.ones((4, 6)), texts).picture_rank.tolist() == [3, 3, 3, 3]


def test_pictures_that_share_a_caption_are_no_rivals():
    texts = np.eye(3)[[0, 0, 1, 2]]
    found = retrieval(texts + 0.1, texts)
    assert found.caption_rank.tolist() == [0, 0, 0, 0]
    assert found.picture_rank.tolist() == [0, 0, 0, 0]
