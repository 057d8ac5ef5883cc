"""Attention of one new position to a cache of keys and values, for captured decoding: see `api.decode_attention`."""
