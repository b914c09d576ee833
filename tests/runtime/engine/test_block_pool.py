from __future__ import annotations

import pytest

from pagoda_runtime.engine.block_pool import BlockPool, hash_block, root_hash

ROOT_HASH = root_hash("")


def make_pool(num_blocks: int = 4) -> BlockPool:
    return BlockPool(num_blocks, 2, enable_prefix_caching=True)


def register_chain(pool: BlockPool, blocks: list[int]) -> list[bytes]:
    hashes = []
    for block in blocks:
        parent = hashes[-1] if hashes else ROOT_HASH
        hashes.append(hash_block(parent, [block, block]))
        pool.register(block, hashes[-1], parent, [block, block])
    return hashes


def test_block_0_is_never_handed_out():
    assert sorted(make_pool(4).allocate(4)) == [1, 2, 3, 4]


def test_blocks_that_return_can_be_handed_out_again():
    pool = make_pool()
    table = pool.allocate(4)
    pool.release(table)
    pool.check([])
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]


def test_a_shared_block_is_free_only_when_its_last_holder_lets_go():
    pool = make_pool()
    table = pool.allocate(1)
    pool.hold(table)
    pool.release(table)
    assert pool.num_used == 1
    pool.release(table)
    assert pool.num_used == 0


def test_a_freed_block_is_found_by_its_content_and_taken_from_the_middle_of_the_free_list():
    pool = make_pool()
    table = pool.allocate(3)
    hashes = register_chain(pool, table)
    pool.release(table)
    found = pool.find_prefix(hashes[:2])
    pool.hold(found)
    assert found == table[:2]
    assert pool.num_free == 2
    pool.check([found])


def test_the_tail_of_a_prompt_is_evicted_before_its_head():
    pool = make_pool(3)
    table = pool.allocate(3)
    hashes = register_chain(pool, table)
    pool.release(table)
    pool.allocate(1)
    assert pool.find_prefix(hashes) == table[:2]


def test_the_least_recently_used_prompt_is_evicted_first():
    pool = make_pool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    old_hashes, new_hashes = register_chain(pool, old), register_chain(pool, new)
    pool.release(old)
    pool.release(new)
    pool.allocate(2)
    assert pool.find_prefix(old_hashes) == []
    assert pool.find_prefix(new_hashes) == new


def test_a_block_without_a_name_is_reused_before_a_cached_one():
    pool = make_pool(3)
    cached, nameless = pool.allocate(2), pool.allocate(1)
    hashes = register_chain(pool, cached)
    pool.release(nameless)
    pool.release(cached)
    assert pool.allocate(1) == nameless
    assert pool.find_prefix(hashes) == cached


def test_a_block_handed_out_again_is_no_longer_found_by_its_old_content():
    pool = make_pool(1)
    table = pool.allocate(1)
    hashes = register_chain(pool, table)
    pool.release(table)
    pool.allocate(1)
    assert pool.find_prefix(hashes) == []


def test_equal_blocks_after_different_beginnings_have_different_names():
    first, second = hash_block(ROOT_HASH, [1, 2]), hash_block(ROOT_HASH, [3, 4])
    assert hash_block(first, [5, 6]) != hash_block(second, [5, 6])


def test_check_notices_a_reference_that_no_table_has():
    pool = make_pool()
    pool.allocate(1)
    with pytest.raises(AssertionError, match="references differ"):
        pool.check([])
