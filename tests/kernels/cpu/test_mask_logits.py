import pytest
import torch

from pagoda_kernels.cpu.mask_logits import mask_logits_cpu


@pytest.mark.parametrize("vocab_size", [1, 8, 31, 64, 2050])
def test_tokens_keep_their_logits_where_their_bits_are_one(vocab_size):
    logits = torch.randn(5, vocab_size)
    rows = torch.tensor([3, 0])
    # Masks are of whole words; what is behind the vocabulary says nothing.
    masks = torch.randint(0, 256, (2, 4 * -(-vocab_size // 32)), dtype=torch.uint8)
    masks[0, 0], masks[1, -1] = 0, 255
    expected = logits.clone()
    for row, mask in zip(rows.tolist(), masks.tolist(), strict=True):
        for token_id in range(vocab_size):
            if not mask[token_id // 8] >> token_id % 8 & 1:
                expected[row, token_id] = -torch.inf
    mask_logits_cpu(logits, rows, masks, len(rows), vocab_size, masks.shape[1])
    assert torch.equal(logits, expected)
