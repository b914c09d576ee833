"""Pagoda's kernels: one folder per operation, with its checks, its specification and its maths.

kv_cache: how keys and values are stored.
launch: where Triton kernels run.
paged_attention: the contract of attention backends, which own keys and values, and the reference.
packed_attention: of whole texts, without a cache of keys and values.
copy_blocks: of keys and values, for sequences that part.
rotary: the angles of a step's tokens.
rotate_and_store: norms and rotation of heads, and their keys and values into the cache.
norm: root mean square and layer norms, by themselves or with the sum that they are of.
quantized_linear: what the next two have in common.
grouped_linear: products with matrices of whole numbers of 2 to 8 bits.
scaled_linear: products with matrices of e4m3 or int8, and with rows rounded to the same.
split_sums: products whose columns are split among programs.
cpu: what numba compiles for a CPU; its attention backend, its products with packed matrices, its
search for the largest logit, and what compiles, keeps and runs such kernels.
"""
